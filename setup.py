"""What pyproject.toml cannot say: for `check` where no clone is, a wheel takes along grading/ and the list of stubs."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["tutorial_lib*"]),
        *(f"tutorial_lib.{name}" for name in find_namespace_packages(include=["grading*"])),
        "tutorial_lib.exercises",
    ],
    package_dir={"tutorial_lib.grading": "grading", "tutorial_lib.exercises": "exercises"},
)
