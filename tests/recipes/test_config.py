"""Settings: read, checked all at once, written and read back."""

from dataclasses import asdict, replace

import pytest
import yaml

from xcit.errors import ConfigError
from xcit.recipes.config import TrainConfig, check_config, config_from_dict, read_config, write_config
from xcit.recipes.digits import digits_quickstart


def test_what_is_written_is_read_back(tmp_path):
    config = replace(digits_quickstart(), seed=7, epochs=3)
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == asdict(config)


def test_the_recipe_is_complete_and_in_range():
    assert check_config(digits_quickstart()) == digits_quickstart()


def test_left_out_settings_take_their_defaults():
    config = config_from_dict({"recipe": "mine", "model": {"depth": 2}})
    assert config.model.depth == 2
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
        "model": {"embed_dimm": 3, "depth": "four", "num_heads": -1},
        "optim": {"lr": "fast", "label_smoothing": 1.5},
        "data": [1],
        "augment": {"erase": True},
    }
    with pytest.raises(ConfigError) as caught:
        config_from_dict(content, source="config.yaml")
    message = str(caught.value)
    assert message.startswith("config.yaml cannot be used: ")
    for part in (
        "sed is unknown (did you mean seed?)",
        "epochs is 0; it must be 1 or more",
        "model.embed_dimm is unknown (did you mean model.embed_dim?)",
        "model.depth is 'four'; it must be a whole number",
        "model.num_heads is -1; it must be 1 or more",
        "optim.lr is 'fast'; it must be a number",
        "optim.label_smoothing is 1.5; it must be from 0 to 0.9",
        "data is [1]; it must be settings by name",
        "augment.erase is True; it must be a number",
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
