"""`autoquant spaces`."""

import json

import yaml

from autoquant.plan.space_file import load_space, shipped_names


def test_list_names_every_shipped_space(autoquant):
    listed = json.loads(autoquant("spaces", "list", "--format", "json").stdout)["spaces"]
    assert [space["name"] for space in listed] == list(shipped_names())
    assert all(space["description"] for space in listed)
    lines = autoquant("spaces", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(shipped_names())


def test_show_prints_a_file_that_loads_as_the_same_space(autoquant, tmp_path):
    for name in shipped_names():
        copy = tmp_path / "copy.yaml"
        copy.write_text(autoquant("spaces", "show", name).stdout)
        assert load_space(copy) == load_space(name)


def test_show_of_an_unknown_space_names_the_nearest(autoquant):
    result = autoquant("spaces", "show", "defualt")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "'default'" in result.stderr


def test_schema_is_json_and_knows_every_key_of_the_default_space(autoquant):
    schema = json.loads(autoquant("spaces", "schema").stdout)
    default = yaml.safe_load(autoquant("spaces", "show", "default").stdout)
    assert default.keys() <= schema["properties"].keys()
