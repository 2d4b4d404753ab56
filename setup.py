"""Maps the four folders to trialign.*; the compiled part, trialign._C, is described in csrc/build.py's stead below."""

from setuptools import find_namespace_packages, setup

FOLDERS = ("kernels", "engine", "models", "algorithms")
packages = find_namespace_packages(include=[pattern for f in FOLDERS for pattern in (f, f"{f}.*")])
setup(
    packages=["trialign", *(f"trialign.{package}" for package in packages)],
    # The namespace's root holds only _C, beside its sources.
    package_dir={"trialign": "csrc", **{f"trialign.{f}": f for f in FOLDERS}},
    include_package_data=False,
)
