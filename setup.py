"""What pyproject.toml cannot say: the top-level folder kernels/ is installed as the package moe3d.kernels."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["moe3d", "moe3d.*"]), "moe3d.kernels"],
    package_dir={"moe3d.kernels": "kernels"},
)
