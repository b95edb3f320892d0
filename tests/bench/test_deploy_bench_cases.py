import pytest

from xcit.bench import deploy_cases
from xcit.bench.deploy_cases import CASES, GROUPS, PEERS, QUICK_CASES, DeployCase, Entry, entries, parse, select
from xcit.errors import ConfigError, UnknownNameError

RUNTIMES = deploy_cases.RUNTIMES


def test_every_listed_case_is_named_once_and_read_back():
    names = [str(case) for case in (*CASES, *QUICK_CASES)]
    assert len(names) == len(set(names))
    assert [parse(name) for name in names] == [*CASES, *QUICK_CASES]
    assert {case.group for case in CASES} == set(GROUPS)


def test_the_cases_that_the_acceptance_asks_for_are_listed():
    names = set(map(str, CASES))
    assert names >= {f"xcit/xcit_small_12_p8/{size}/1" for size in (224, 512, 1024, 2048)}
    for model in ("xcit_small_12_p16", "xcit_small_12_p8", "vit_small_patch16_224"):
        sizes = [case.image_size for case in CASES if (case.group, case.model) == ("linear", model)]
        assert sizes[0] == 512
        assert sizes[-1] == 2048
        assert len(sizes) >= 4
    assert any(case.batch_size > 1 for case in CASES if case.group == "peers")


def test_patterns_and_names():
    assert [str(case) for case in select(["xcit/*p8/512/1"])] == ["xcit/xcit_small_12_p8/512/1"]
    assert select(["training/*"]) == [case for case in CASES if case.group == "training"]
    odd = DeployCase("xcit", "xcit_nano_12_p16", 96, 3)
    assert select([str(odd), "xcit/*p8/512/1", str(odd)]) == [odd, parse("xcit/xcit_small_12_p8/512/1")]


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("xcit/*p9*", UnknownNameError, "--list"),
        ("xcit_small_12_p8", ConfigError, "GROUP/MODEL/SIZE/BATCH, such as xcit/"),
        ("xct/xcit_small_12_p8/224/1", UnknownNameError, "Did you mean 'xcit'"),
        ("xcit/xcit_smal_12_p8/224/1", UnknownNameError, "Did you mean 'xcit_small_12_p8'"),
        ("xcit/resnet50/224/1", UnknownNameError, "xcit models"),
        ("peers/xcit_nano_12_p8/224/1", UnknownNameError, "There are peers for"),
        ("xcit/xcit_small_12_p8/16/1", ConfigError, "32 px or more"),
        ("xcit/xcit_small_12_p8/224/0", ConfigError, "one image or more"),
        ("training/xcit_small_12_p8/224/1", ConfigError, "batch of 2 or more"),
    ],
)
def test_names_that_are_no_case(name, error, words):
    with pytest.raises(error) as caught:
        select([name])
    assert words in str(caught.value)


def test_who_competes_in_inference():
    found = entries(DeployCase("xcit", "xcit_small_12_p8", 512, 1), RUNTIMES)
    assert [str(entry) for entry in found] == [
        *(f"timm {runtime}" for runtime in RUNTIMES),
        "ours eager",
        *(f"folded {runtime}" for runtime in RUNTIMES),
    ]
    without_eager = entries(DeployCase("xcit", "xcit_small_12_p8", 512, 1), ("openvino",))
    assert [str(entry) for entry in without_eager] == ["timm openvino", "folded openvino"]


def test_who_competes_in_training():
    found = entries(DeployCase("training", "xcit_small_12_p8", 224, 2), RUNTIMES)
    assert [str(entry) for entry in found] == ["timm eager", "timm compile", "ours eager", "ours compile"]


def test_peers_run_where_they_have_their_accuracy_or_all_at_one_size():
    home = entries(DeployCase("peers", "xcit_small_12_p16", 224, 1), ("eager",))
    assert home[0] == Entry("folded", "xcit_small_12_p16", 224, "eager")
    assert {entry.model: entry.image_size for entry in home[1:]} == {
        peer.name: peer.image_size for peer in PEERS["xcit_small_12_p16"]
    }
    large = entries(DeployCase("peers", "xcit_small_12_p16", 1024, 1), ("eager",))
    assert {entry.image_size for entry in large} == {1024}


def test_every_band_has_every_family():
    families = ("deit", "swin", "convnext", "cait", "regnety", "resnet")
    for peers in PEERS.values():
        assert [next(f for f in families if peer.name.startswith(f)) for peer in peers] == [*families]


def test_timm_has_all_peers():
    timm = pytest.importorskip("timm")
    known = set(timm.list_models())
    assert {peer.name for peers in PEERS.values() for peer in peers} <= known
    assert {case.model for case in CASES if not case.is_xcit} <= known
