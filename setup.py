"""Packaging metadata, read from settings.ini so that nbdev and pip agree."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

cfg = ConfigParser(delimiters=["="], interpolation=None)
cfg.read("settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]

extras = {
    "dev": cfg["dev_requirements"].split(),
    "gpu": cfg["gpu_requirements"].split(),
    "grid": cfg["grid_requirements"].split(),
    "track": cfg["track_requirements"].split(),
}


class WithNotebooks(build_py):
    """A wheel carries the stage notebooks, which papermill runs."""

    def run(self):
        super().run()
        if self.editable_mode:
            return  # a checkout runs its own notebooks
        out = Path(self.build_lib) / "mint_nb" / "nbs"
        out.mkdir(parents=True, exist_ok=True)
        for notebook in Path("nbs").glob("[0-9]9_*.ipynb"):
            self.copy_file(str(notebook), str(out / notebook.name))


setup(
    cmdclass={"build_py": WithNotebooks},
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    license="Apache-2.0",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
    ],
    packages=find_packages(include=["mint_nb", "mint_nb.*"]),
    package_data={"mint_nb": ["profiles/*.yaml", "accelerate/*.yaml"]},
    include_package_data=True,
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    python_requires=">=" + cfg["min_python"],
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)
