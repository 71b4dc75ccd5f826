"""The exact update of every rule on one fixed input: whoever changes a number sees which, and says why.

Three domains, two tensors of 4 and 2 elements, float64; each rule at the whole model, at chunk(2) and, where it is
element-wise, element by element; what is drawn comes from seed 0. `python tests/surgery/test_frozen.py` prints the
table anew.
"""

from __future__ import annotations

import pytest
import torch
from families import GRAM_RULES

from gsdg.surgery import Chunk, NormOutliers, PerElement, Surgery, WholeModel
from gsdg.surgery import rules as R

G = torch.tensor(
    [
        [1.0, -2.0, 0.5, 3.0, -1.0, 2.0],
        [-1.5, 1.0, 1.0, 2.0, -0.5, -3.0],
        [2.0, 0.25, -4.0, 1.0, -2.0, 0.5],
    ],
    dtype=torch.float64,
)
CASES = {
    **{
        f"{name} {where}": (rule, partition, 1.0)
        for name, rule in (GRAM_RULES | {"gradvac": lambda: R.GradVac(beta=0.5)}).items()
        for where, partition in (("model", WholeModel), ("chunk", lambda: Chunk(2)))
    },
    "corgrad chunk alpha": (R.CorGrad, lambda: Chunk(2), 0.6),
    "agr_sum": (R.AgrSum, PerElement, 1.0),
    "agr_rand": (R.AgrRand, PerElement, 1.0),
    "and_mask": (R.AndMask, PerElement, 1.0),
    "sand_mask": (lambda: R.SandMask(tau=0.2), PerElement, 1.0),
    "graddrop": (R.GradDrop, PerElement, 1.0),
}
FROZEN = {
    "mean model": [0.5, -0.25, -0.833333333, 2.0, -1.166666667, -0.166666667],
    "mean chunk": [0.5, -0.25, -0.833333333, 2.0, -1.166666667, -0.166666667],
    "sum model": [1.5, -0.75, -2.5, 6.0, -3.5, -0.5],
    "sum chunk": [1.5, -0.75, -2.5, 6.0, -3.5, -0.5],
    "pcgrad model": [1.321139971, -0.396512747, -2.851467051, 7.304954305, -4.206854257, -1.583645984],
    "pcgrad chunk": [1.477988166, -0.146213018, -2.570588235, 6.917647059, -3.5, 0.0],
    "gradvac model": [1.438215595, -0.626173303, -2.667175757, 6.749621537, -3.889271724, -0.995239176],
    "gradvac chunk": [1.455123323, -0.355654897, -2.5359301, 6.467091297, -3.5, 0.0],
    "corgrad model": [1.700529101, -0.555291005, -3.186772487, 6.493121693, -3.986243386, -0.824867725],
    "corgrad chunk": [2.104142012, -0.583136095, -2.970588235, 6.117647059, -3.5, 0.5],
    "mgda model": [0.131390737, -0.055409776, -0.450832977, 2.024897785, -1.035497651, -0.652553854],
    "mgda chunk": [0.0, 0.0, -0.346153846, 1.730769231, -0.5, 0.0],
    "cagrad model": [0.124347802, -0.052439647, -0.426666989, 1.916357239, -0.979991896, -0.617575026],
    "cagrad chunk": [0.178289915, -0.063304388, -0.408067104, 2.040335522, -1.166666667, -0.055555556],
    "imtl_g model": [0.196546514, -0.03124484, -0.591433129, 1.979758796, -1.072262573, -0.626077529],
    "imtl_g chunk": [6.355349972, 0.531523904, -1.032433639, 1.985442181, -0.857142857, 1.384615385],
    "aligned_mtl model": [0.269708681, -0.132987845, -0.562684698, 1.839925858, -0.997430303, -0.394589458],
    "aligned_mtl chunk": [0.301991496, -0.1114328, -0.718565106, 1.982742574, -1.166666667, -0.166666667],
    "upgrad model": [0.431032481, -0.13664993, -0.927899204, 2.434205809, -1.392937243, -0.527492515],
    "upgrad chunk": [0.0, 0.0, -0.856862745, 2.305882353, -1.166666667, 0.0],
    "dualproj model": [0.5, -0.25, -0.833333333, 2.0, -1.166666667, -0.166666667],
    "dualproj chunk": [0.0, 0.0, -0.833333333, 2.0, -1.166666667, 0.0],
    "nash model": [1.192895195, -0.580635103, -2.604822352, 8.866468916, -4.767233418, -2.044380736],
    "nash chunk": [3.675e-06, 7.55e-07, -2.630590763, 7.730623677, -3.968626967, 4.458e-06],
    "corgrad chunk alpha": [1.387455621, -1.34964497, -1.182352941, 7.270588235, -3.3, 0.3],
    "agr_sum": [0.0, 0.0, 0.0, 6.0, -3.5, 0.0],
    "agr_rand": [1.915897526, 3.980625082, -3.416473498, 6.0, -3.5, 0.864673304],
    "and_mask": [0.0, 0.0, 0.0, 7.999999997, -2.333333333, 0.0],
    "sand_mask": [0.377186294, -0.241763685, -0.281472637, 3.881611016, -1.944757031, -0.0555109],
    "graddrop": [3.0, 1.25, -4.0, 6.0, -3.5, 2.5],
}


def update(case: str) -> list[float]:
    rule, partition, alpha = CASES[case]
    params = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 2), (2,))]
    surgery = Surgery(params, partition(), rule(), outliers=NormOutliers(alpha))
    torch.manual_seed(0)
    surgery.combine(G)
    return surgery.combine(G).tolist()  # the second, in which a memory shows


@pytest.mark.parametrize("case", CASES)
def test_update(case):
    assert update(case) == pytest.approx(FROZEN[case], rel=1e-7, abs=1e-7)


if __name__ == "__main__":
    for case in CASES:
        print(f'    "{case}": {[round(value, 9) + 0.0 for value in update(case)]},')
