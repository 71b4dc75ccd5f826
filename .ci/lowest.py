"""Print the lowest versions that setup.cfg admits, as constraints for pip: `torch>=2.6` -> `torch==2.6`."""

import configparser
import re

config = configparser.ConfigParser()
config.read("setup.cfg")
requirements = config["options"]["install_requires"] + "".join(config["options.extras_require"].values())
for name, version in sorted(set(re.findall(r"^([\w-]+)>=([\w.]+)", requirements, re.MULTILINE))):
    print(f"{name}=={version}")
