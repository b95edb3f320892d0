"""Settings: read, checked all at once, replaced by name, written and read back."""

from dataclasses import asdict, replace

import pytest
import yaml

from xcit.errors import ConfigError
from xcit.recipes.config import DataConfig, TrainConfig
from xcit.recipes.config_file import config_from_dict, read_config
from xcit.recipes.digits import digits_quickstart
from xcit.recipes.settings import check_config, override, write_config

SOUND = TrainConfig(recipe="mine", data=DataConfig(root="photos"))
"""Settings that contradict nothing."""


def test_what_is_written_is_read_back(tmp_path):
    config = replace(digits_quickstart(), seed=7, epochs=3)
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == asdict(config)


def test_the_recipe_is_complete_and_in_range():
    assert check_config(digits_quickstart()) == digits_quickstart()


def test_left_out_settings_take_their_defaults():
    config = config_from_dict({"recipe": "mine", "model": {"drop_path_rate": 0.2}})
    assert config.model.drop_path_rate == 0.2
    assert config.optim == TrainConfig(recipe="mine").optim


def test_numbers_as_yaml_has_them():
    config = config_from_dict(yaml.safe_load("{recipe: mine, optim: {lr: 1e-3, weight_decay: 0}}"))
    assert config.optim.lr == 0.001
    assert type(config.optim.weight_decay) is float


def test_all_problems_are_named_at_once():
    content = {
        "recipe": "mine",
        "sed": 1,
        "epochs": 0,
        "model": {"grad_chekpointing": True, "name": 3, "drop_path_rate": -1, "options": {"depth": [4]}},
        "optim": {"lr": "fast", "label_smoothing": 1.5, "opt": "adam"},
        "data": [1],
        "augment": {"erase": True, "repeats": 2.5},
        "compute": {"compile": "yes"},
    }
    with pytest.raises(ConfigError) as caught:
        config_from_dict(content, source="config.yaml")
    message = str(caught.value)
    assert message.startswith("config.yaml cannot be used: ")
    for part in (
        "sed is unknown (did you mean seed?)",
        "epochs is 0; it must be 1 or more",
        "model.grad_chekpointing is unknown (did you mean model.grad_checkpointing?)",
        "model.name is 3; it must be text",
        "model.drop_path_rate is -1.0; it must be from 0 to 0.9",
        "model.options is {'depth': [4]}; it must be numbers, words or true/false by name",
        "optim.lr is 'fast'; it must be a number",
        "optim.label_smoothing is 1.5; it must be from 0 to 0.9",
        "optim.opt is 'adam'; it must be one of adamw, sgd",
        "data is [1]; it must be settings by name",
        "augment.erase is True; it must be a number",
        "augment.repeats is 2.5; it must be a whole number",
        "compute.compile is 'yes'; it must be true or false",
    ):
        assert part in message


def test_a_missing_setting_and_no_settings():
    with pytest.raises(ConfigError, match="recipe is missing"):
        config_from_dict({})
    with pytest.raises(ConfigError, match="the whole is None; it must be settings by name"):
        config_from_dict(None)


def test_out_of_range_in_python():
    with pytest.raises(ConfigError, match="seed is -1; it must be from 0 to"):
        check_config(replace(digits_quickstart(), seed=-1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_is_out_of_range(value):
    with pytest.raises(ConfigError, match=r"optim\.weight_decay is (nan|inf)"):
        config_from_dict({"recipe": "mine", "optim": {"weight_decay": value}})


def test_choices_that_look_like_numbers():
    """YAML has 32 for a number where its user means a word, and true for what Python takes for 1."""
    config = config_from_dict(yaml.safe_load("{recipe: mine, compute: {precision: 16}, data: {in_chans: 1}}"))
    assert config.compute.precision == "16"
    assert config.data.in_chans == 1
    with pytest.raises(ConfigError, match=r"data\.in_chans is True; it must be one of 1, 3"):
        config_from_dict({"recipe": "mine", "data": {"in_chans": True}})
    with pytest.raises(ConfigError, match=r"compute\.precision is '64'; it must be one of 32, bf16, 16"):
        config_from_dict({"recipe": "mine", "compute": {"precision": 64}})


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_config(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        read_config(tmp_path / "config.yaml")


def test_yaml_runs_nothing(tmp_path):
    (tmp_path / "config.yaml").write_text("recipe: !!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        read_config(tmp_path / "config.yaml")


# --- derived figures -------------------------------------------------------------------------------------------------


def test_the_learning_rate_goes_with_the_batch_unless_told_otherwise():
    changes = {"optim.lr": 1e-3, "optim.batch_size": 256, "optim.lr_batch": 512}
    assert override(SOUND, changes).lr == 5e-4
    assert override(SOUND, changes | {"optim.lr_batch": 0}).lr == 1e-3


def test_a_device_computes_its_part_of_the_batch():
    config = override(
        SOUND, {"optim.batch_size": 96, "optim.accumulate": 2, "compute.devices": 4, "compute.num_nodes": 3}
    )
    assert (config.world_size, config.micro_batch_size) == (12, 4)


# --- contradictions --------------------------------------------------------------------------------------------------

UNMIXED = {"augment.mixup": 0, "augment.cutmix": 0}
CONTRADICTIONS = {
    "batch": (
        {"optim.batch_size": 100, "compute.devices": 3, "optim.accumulate": 2} | UNMIXED,
        "optim.batch_size is 100, which 3 devices x 2 parts do not divide; take 96 or 102",
    ),
    "small batch": (
        {"optim.batch_size": 2, "compute.devices": 3} | UNMIXED | {"optim.lr_batch": 0},
        "optim.batch_size is 2, which 3 devices x 1 parts do not divide; take 3",
    ),
    "odd": ({"optim.batch_size": 514, "compute.devices": 2}, "mixup pairs the images of a batch, and 257 on a device"),
    "class weights": ({"data.class_weights": "balanced"}, "data.class_weights needs hard targets"),
    "min_lr": ({"optim.min_lr": 0.5}, "optim.min_lr is 0.5, above the peak learning rate of 0.001"),
    "warmup_lr": ({"optim.warmup_lr": 0.25}, "optim.warmup_lr is 0.25, above the peak learning rate of 0.001"),
    "warmup": ({"epochs": 5}, "optim.warmup_epochs is 5 of 5 epochs in all"),
    "alpha": ({"distill.kind": "hard", "distill.alpha": 0}, "distill.alpha is 0, so that the teacher"),
    "tau": ({"distill.kind": "hard", "distill.tau": 3}, "distill.tau is 3, which only distill.kind=soft uses"),
    "fsdp ema": (
        {"compute.strategy": "fsdp", "compute.devices": 2, "optim.ema_decay": 0.9},
        "so that optim.ema_decay cannot average them",
    ),
    "fsdp clip": (
        {"compute.strategy": "fsdp", "compute.devices": 2, "optim.clip_grad": 1},
        "whose norm optim.clip_grad would need",
    ),
    "fsdp alone": ({"compute.strategy": "fsdp"}, "compute.strategy=fsdp needs several devices"),
    "half on a CPU": ({"compute.precision": "16", "compute.device": "cpu"}, "compute.precision=16 is for GPUs"),
    "variant": (
        {"model.pretrained": "released", "model.variant": "no_lpi"},
        "model.variant changes the architecture, which model.pretrained has no weights for",
    ),
    "surgery of timm": (
        {"model.name": "timm:resnet18", "model.surgery": "xcit_large_24_p8_224"},
        "model.surgery and model.variant are for XCiT",
    ),
    "variant of timm": (
        {"model.name": "timm:resnet18", "model.variant": "no_lpi"},
        "model.surgery and model.variant are for XCiT",
    ),
    "digits": ({"data.format": "digits"}, "data.format=digits is the embedded set; drop data.root"),
    "no data": ({"data.root": ""}, "data.root is empty; name the images with --data"),
    "download": ({"data.download": True}, "data.download is for named data sets; data.format is auto"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_is_refused(case):
    changes, message = CONTRADICTIONS[case]
    with pytest.raises(ConfigError) as caught:
        check_config(override(SOUND, changes))
    assert message in str(caught.value)
    assert len(list(override(SOUND, changes).contradictions())) == 1  # it alone is contradicted


def test_what_they_contradict_is_sound_by_itself():
    assert list(SOUND.contradictions()) == []
    for changes in (
        {"data.class_weights": "balanced"} | UNMIXED,
        {"data.class_weights": "balanced", "augment.mix_prob": 0},
        {"optim.batch_size": 514, "compute.devices": 2} | UNMIXED,
        {"epochs": 5, "optim.warmup_epochs": 0},
        {"distill.kind": "soft", "distill.tau": 3},
        {"compute.strategy": "fsdp", "compute.devices": 2},
        {"data.format": "cifar10", "data.download": True},
        {"data.format": "digits", "data.root": ""},
    ):
        assert check_config(override(SOUND, changes))


def test_all_contradictions_are_named_at_once():
    settings = {
        "optim.batch_size": 514, "compute.devices": 2, "data.class_weights": "balanced", "optim.min_lr": 0.5,
        "optim.warmup_lr": 0.25, "epochs": 5, "distill.kind": "hard", "distill.alpha": 0, "distill.tau": 3,
        "compute.strategy": "fsdp", "optim.ema_decay": 0.9, "optim.clip_grad": 1, "compute.precision": "16",
        "compute.device": "cpu", "model.pretrained": "released", "model.variant": "no_lpi", "data.format": "digits",
        "data.download": True, "augment.hflip": 2,
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        check_config(override(SOUND, settings))
    message = str(caught.value)
    named = (
        "odd", "class weights", "min_lr", "warmup_lr", "warmup", "alpha", "tau", "fsdp ema", "fsdp clip",
        "half on a CPU", "variant", "digits",
    )  # fmt: skip
    for case in named:
        part = CONTRADICTIONS[case][1]
        if case not in ("min_lr", "warmup_lr"):  # their peak is another here
            assert part in message, case
    assert "optim.min_lr is 0.5, above" in message
    assert "optim.warmup_lr is 0.25, above" in message
    assert "augment.hflip is 2.0; it must be from 0 to 1" in message
    assert message.count(";") > len(named)


# --- replacing -------------------------------------------------------------------------------------------------------


def test_settings_are_replaced_by_dotted_names():
    changes = {"epochs": 7, "optim.lr": "1e-3", "augment.rand_augment": "", "compute.precision": "16"}
    changed = override(SOUND, changes | {"compute.compile": "true", "model.name": "123"})
    assert changed == replace(
        SOUND,
        epochs=7,
        optim=replace(SOUND.optim, lr=1e-3),
        augment=replace(SOUND.augment, rand_augment=""),
        compute=replace(SOUND.compute, precision="16", compile=True),
        model=replace(SOUND.model, name="123"),
    )
    assert TrainConfig(recipe="mine", data=DataConfig(root="photos")) == SOUND  # as it was


def test_options_of_the_model_are_open_ended():
    changed = override(SOUND, {"model.options.depth": "4", "model.options.tokens_norm": "true"})
    changed = override(changed, {"model.options.eta": "1e0", "model.options.depth": 5})
    assert changed.model.options == {"depth": 5, "tokens_norm": True, "eta": "1e0"}
    assert override(SOUND, {"model.options": "{depth: 2}"}).model.options == {"depth": 2}


def test_all_that_cannot_be_replaced_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        override(
            SOUND,
            {
                "optim.weight_decai": 1, "flux": 2, "epochs": "many", "epochs.more": 1, "optim": 3,
                "compute.devices": "[1", "model.options.depth": "[1]",
            },
            source="--set",
        )  # fmt: skip
    message = str(caught.value)
    assert message.startswith("--set cannot be used: ")
    for part in (
        "optim.weight_decai is unknown (did you mean optim.weight_decay?)",
        "flux is unknown",
        "epochs is 'many'; it must be a whole number",
        "epochs.more is unknown",
        "optim is unknown",
        "compute.devices is '[1'; it must be a whole number",
        "model.options is {'depth': [1]}; it must be numbers, words or true/false by name",
    ):
        assert part in message, part
