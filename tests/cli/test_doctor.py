"""`xcit doctor`: that what it says is so."""

import importlib.metadata
import platform

import pytest
import torch

from xcit import __version__
from xcit.cli import doctor
from xcit.cli.main import main
from xcit.ops import xca


def test_it_says_what_is_so(capsys, monkeypatch):
    monkeypatch.setenv("XCIT_CACHE", "some/where")
    monkeypatch.setenv("XCIT_OFFLINE", "1")
    assert main(["doctor"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["xcit", __version__] in lines
    assert ["torch", importlib.metadata.version("torch")] in lines
    assert ["python", platform.python_version()] in [line[:2] for line in lines]
    assert ["kernels", torch.backends.cpu.get_cpu_capability()] in lines
    assert ["cache", "some/where"] in lines
    assert ["network", "forbidden", "by", "XCIT_OFFLINE"] in lines
    assert ["train", "installed", "(for", "xcit", "train", "and", "quickstart)"] in lines
    assert [line[:3] for line in lines if "form" in line[1:2]] == [
        ["tokens", "form", "works"],
        ["covariance", "form", "works"],
    ]


def test_a_wrong_form_is_found(capsys, monkeypatch):
    right = xca.xca_covariance
    monkeypatch.setattr(xca, "xca_covariance", lambda x, weights: right(x, weights) * 1.01)
    assert main(["doctor"]) == 1
    assert "covariance form       WRONG" in capsys.readouterr().out


def test_a_missing_extra_names_what_to_install(monkeypatch):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "lightning" else version(name))
    facts = dict(doctor._extras())
    assert facts["train"] == "missing lightning; pip install 'xcit[train]' (for xcit train and quickstart)"
    assert facts["video"] == "installed (for xcit attend on videos)"


def test_the_extras_are_those_of_the_package():
    """What `doctor` looks for is what the package declares."""
    declared = {}
    for requirement in importlib.metadata.requires("xcit"):
        name, _, marker = requirement.partition(";")
        if "extra ==" in marker and not name.startswith("xcit"):
            extra = marker.split("==")[1].strip(" '\"")
            declared.setdefault(extra, set()).add(name.split("<")[0].split(">")[0].split("=")[0].strip())
    declared.pop("all", None)
    assert {extra: set(packages) for extra, (packages, _) in doctor.EXTRAS.items()} == declared


@pytest.mark.parametrize("name", doctor.PACKAGES)
def test_every_package_it_shows_is_a_dependency(name):
    assert any(requirement.startswith(name) for requirement in importlib.metadata.requires("xcit"))
