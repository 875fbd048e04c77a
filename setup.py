"""What pyproject.toml cannot say: a wheel takes grading/ along, inside the package, for `check` where no clone is."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["tutorial_lib*"]),
        *(f"tutorial_lib.{name}" for name in find_namespace_packages(include=["grading*"])),
    ],
    package_dir={"tutorial_lib.grading": "grading"},
)
