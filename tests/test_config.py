import contextlib
import copy
import pickle
import sys
from types import SimpleNamespace

import pytest

from llava_mmfuser import MMFuserConfig
from llava_mmfuser import __main__ as command_line
from llava_mmfuser.layers import Layers, spell
from llava_mmfuser.towers import TowerConfig

VIT_L = TowerConfig("CLIP", 1024, 24, 0)


@pytest.mark.parametrize(
    "text",
    [
        "=-22,-17,-12,-7,-2",
        "-22,-17,-12,-7,-2",
        "-22 -17 -12 -7 -2",
        "[-22,-17,-12,-7,-2]",
        "list-22/-17/-12/-7/-2",
        "3,8,13,18,23",
        "3 8 13 18 23",
        "[3, 8, 13, 18, 23]",
        "3,-17,13,-7,23",
        (3, 8, 13, 18, 23),
        [-22, -17, -12, -7, -2],
        "-2",
        -2,
        23,
    ],
)
def test_every_spelling_means_the_default_layers_of_vit_l(text):
    assert Layers.parse(text).resolve(24) == (3, 8, 13, 18, 23)


def test_layers_are_a_value_that_knows_how_it_was_given():
    query, deep, listed = Layers.parse(-2), Layers.parse_listed("deep", -2), Layers.parse("3,23")
    assert query == Layers((-2,), "uniform") != deep and deep != (-2,) and listed == (3, 23) and hash(listed)
    assert (str(query), str(deep), str(listed)) == ("-2", "deep", "3,23")
    assert (query.select_layer, deep.select_layer, listed.select_layer) == (-2, -2, (3, 23))
    assert deep.setting == "mm_fuser_layers" and listed.setting == "mm_vision_select_layer"
    for layers in (query, deep, listed):
        for same in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
            assert same == layers and vars(same) == vars(layers)


@pytest.mark.parametrize(
    "depth,query,layers",
    [
        (24, -2, (3, 8, 13, 18, 23)),
        (24, -1, (4, 9, 14, 19, 24)),
        (8, -2, (3, 4, 5, 6, 7)),
        (12, 11, (3, 5, 7, 9, 11)),
        (4, 4, (0, 1, 2, 3, 4)),
    ],
)
def test_uniform_default(depth, query, layers):
    assert Layers.parse(query).resolve(depth) == layers


@pytest.mark.parametrize(
    "layers,message",
    [
        ((3, 25), "layer 25 does not exist; this vision tower has 24 blocks"),
        (-26, "layer -26 does not exist"),
        ((3, 3, 23), "names a layer twice"),
        ((-2, 23), "names a layer twice"),
        ((23, 3), "23,3 is not in order; write shallow to deep, the query layer last: 3,23"),
        ((-2, -7, -12), r"not in order \(as indices: 23,18,13\); .* the query layer last: -12,-7,-2"),
        ((-2, 3), r"not in order \(as indices: 23,3\); .* the query layer last: 3,-2"),
        (2, "no uniform set of layers below"),
    ],
)
def test_layers_that_a_tower_cannot_give_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        Layers.parse(layers).resolve(24)


@pytest.mark.parametrize(
    "value,message",
    [
        ("3;8", "is not a list of layers; write it as"),
        ("", "is not a list"),
        ("three", "is not a list"),
        (2.5, "is not a list"),
        (True, "is not a list"),
        ("[23]", "names 1 layer"),
        ("list-2", "names 1 layer"),
        ([23], "names 1 layer"),
        ([], "names 0"),
    ],
)
def test_values_that_name_no_layers_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        Layers.parse(value)


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(projector="mlp"), "mm_fuser_projector='mlp' is not allowed; use linear or mlpNx_gelu"),
        (dict(projector="mlp0x_gelu"), "mm_fuser_projector"),
        (dict(attention="sparse"), "mm_fuser_attention='sparse' is not allowed; use deformable"),
        (dict(self_attention="maybe"), "mm_fuser_self_attention='maybe' is not allowed; use True or False"),
        (dict(num_heads=0), "mm_fuser_num_heads=0 is not allowed"),
        (dict(num_points=-1), "mm_fuser_num_points=-1"),
        (dict(num_points=2.5), "mm_fuser_num_points=2.5"),
    ],
)
def test_settings_that_are_not_allowed_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MMFuserConfig(**settings)


def test_heads_are_checked_against_the_tower():
    with pytest.raises(ValueError, match="mm_fuser_num_heads=12 does not divide the feature width 1024"):
        MMFuserConfig(num_heads=12).resolve(VIT_L)


@pytest.mark.parametrize(
    "layers,message",
    [
        ((-2, -7, -12), "-2,-7,-12 is not in order; write shallow to deep, the query layer last: -12,-7,-2"),
        ((8, 3, -2), "8,3,-2 is not in order; .* last: 3,8,-2"),
        ((-7, -7, -2), "-7,-7,-2 names a layer twice; every"),
        ((-7, 3, -2, 23), None),
    ],
)
def test_order_is_judged_without_a_tower_as_far_as_it_can_be_known(layers, message):
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        Layers(layers).check_order()


def test_settings_round_trip_through_a_llava_config():
    settings = MMFuserConfig(
        layers="-9,-2", projector="linear", self_attention=False, num_heads=8, num_points=2
    ).resolve(VIT_L)
    flat = settings.to_llava()
    assert flat == dict(
        mm_fuser_layers=[16, 23],
        mm_fuser_projector="linear",
        mm_fuser_fusion="mmfuser",
        mm_fuser_attention="deformable",
        mm_fuser_self_attention=False,
        mm_fuser_num_heads=8,
        mm_fuser_num_points=2,
        mm_fuser_window_size=3,
        mm_fuser_output="add",
        mm_fuser_start="identity",
    )
    assert MMFuserConfig.from_llava(SimpleNamespace(mm_vision_select_layer=-1, **flat)) == settings


def test_select_layer_is_the_default_query():
    assert MMFuserConfig.from_llava(SimpleNamespace(mm_vision_select_layer=-2)).resolve(VIT_L).layers == (
        3,
        8,
        13,
        18,
        23,
    )
    listed = MMFuserConfig.from_llava(SimpleNamespace(mm_vision_select_layer="list-9/-2"))
    assert listed.resolve(VIT_L).layers == (16, 23)


def test_select_layer_none_is_left_alone():
    from llava_mmfuser.hooks.arguments import check_arguments

    check_arguments(SimpleNamespace(mm_projector_type="mlp2x_gelu", mm_vision_select_layer=None))


@pytest.mark.parametrize(
    "blocks,query,expected",
    [
        (24, -2, dict(shallow="1,2,3,4,23", middle="10,11,12,13,23", deep="19,20,21,22,23", uniform="3,8,13,18,23")),
        (12, -2, dict(shallow="1,2,3,4,11", middle="4,5,6,7,11", deep="7,8,9,10,11", uniform="3,5,7,9,11")),
        (24, -1, dict(shallow="1,2,3,4,24", middle="10,11,12,13,24", deep="20,21,22,23,24", uniform="4,9,14,19,24")),
        (6, 5, dict(shallow="1,2,3,4,5", middle="1,2,3,4,5", deep="1,2,3,4,5", uniform="1,2,3,4,5")),
        (3, -1, dict(all="0,1,2,3")),
    ],
)
def test_named_sets(blocks, query, expected):
    tower = TowerConfig("CLIP", 1024, blocks, 0)
    for name, layers in expected.items():
        given = SimpleNamespace(mm_fuser_layers=name, mm_vision_select_layer=query)
        assert spell(MMFuserConfig.from_llava(given).resolve(tower).layers) == layers, name


def test_named_sets_that_do_not_fit_or_do_not_exist_are_refused():
    tower = TowerConfig("CLIP", 1024, 4, 0)
    for name, query in (("shallow", 3), ("middle", 3), ("middle", 4)):
        given = SimpleNamespace(mm_fuser_layers=name, mm_vision_select_layer=query)
        with pytest.raises(ValueError, match=f"mm_fuser_layers={name}: there is no {name} set of .*{query}"):
            MMFuserConfig.from_llava(given).resolve(tower)
    with pytest.raises(ValueError, match="mm_fuser_layers='deeper' is not a set of layers; use uniform or shallow or"):
        MMFuserConfig.from_llava(SimpleNamespace(mm_fuser_layers="deeper"))
    with pytest.raises(ValueError, match="give the query alone in mm_vision_select_layer, such as 23"):
        MMFuserConfig.from_llava(SimpleNamespace(mm_fuser_layers="deep", mm_vision_select_layer="3,23"))


@pytest.mark.parametrize(
    "flags,message",
    [
        (dict(mm_fuser_fusion="concat"), "mm_fuser_fusion='concat' is not allowed; use mmfuser or mean or sum or"),
        (dict(mm_fuser_attention="dense", mm_fuser_num_points=4), "mm_fuser_num_points=4 has no effect with .*=dense"),
        (dict(mm_fuser_attention="deformable", mm_fuser_window_size=3), "mm_fuser_window_size=3 has no effect with"),
        (dict(mm_fuser_fusion=["mean"]), "mm_fuser_fusion=.'mean'. is not allowed"),
        (dict(mm_fuser_fusion="mean", mm_fuser_num_heads=4), "mm_fuser_num_heads=4 has no effect with .*fusion=mean"),
        (dict(mm_fuser_fusion="mean", mm_fuser_output="columns"), "mm_fuser_output=columns has no effect with .*=mean"),
        (dict(mm_fuser_fusion="sum", mm_fuser_lr=1e-4), "mm_fuser_lr=0.0001 has no effect with .*sum, which has no"),
    ],
)
def test_flags_without_effect_and_unknown_fusions_are_refused(flags, message):
    from llava_mmfuser.hooks.arguments import check_arguments

    with pytest.raises(ValueError, match=message):
        check_arguments(SimpleNamespace(mm_projector_type="mmfuser", mm_vision_select_layer=-2, **flags))


def test_summary_names_what_matters():
    fused = MMFuserConfig(layers="3,8,13,18,23", attention="window", self_attention=False)
    assert fused.summary() == "hidden_states 3,8,13,18,23 -> window attention, num_heads 16, window_size 3"
    assert MMFuserConfig(layers="8,23", fusion="sum").summary() == "hidden_states 8,23 -> sum"
    chosen = MMFuserConfig(layers="8,23", output="columns", start="open").summary()
    assert chosen.endswith("num_heads 16, num_points 4, output columns, start open")


def test_command_shows_the_sets_of_any_depth():
    import host

    command = [sys.executable, "-m", "llava_mmfuser", "layers"]
    lines = host.run(command + ["24"]).stdout.splitlines()
    assert [line.split() for line in lines[:2]] == [["uniform", "3,8,13,18,23"], ["shallow", "1,2,3,4,23"]]
    assert "uniform  none below this layer" in host.run(command + ["4"]).stdout
    done = host.run(command + ["24", "--mm_vision_select_layer", "25"], check=False)
    assert done.returncode == 1 and "layer 25 does not exist; this vision tower has 24 blocks" in done.stdout


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["layers", "1000000000"], "blocks=1000000000 is not allowed; use a whole number from 1 to 1000"),
        (["layers", "9" * 5000], "is not allowed; use a whole number from 1 to 1000"),
        (["layers", "\N{SUPERSCRIPT TWO}"], "cannot be read"),
        (["inspect", "/dev/zero"], "/dev/zero is neither a file nor a folder"),
        (["inspect", "FOLDER"], "is not JSON"),
        (["run", "/"], "cannot be run as a script or as a module"),
    ],
)
def test_odd_arguments_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "config.json").write_text("[" * 100000 + "]" * 100000)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sys.argv", ["llava_mmfuser", *(str(tmp_path) if a == "FOLDER" else a for a in arguments)])
    (tmp_path / "__main__.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path)])
    assert command_line.main() == 1
    out, err = capsys.readouterr()
    assert len((out + err).splitlines()) <= 2 and message in out + err


def test_run_leaves_a_scripts_own_fault_to_the_script(tmp_path):
    import host

    script = tmp_path / "script.py"
    script.write_text("int('no number')\n")
    done = host.run([sys.executable, "-m", "llava_mmfuser", "run", script], check=False)
    assert done.returncode == 1 and "Traceback" in done.stdout and f'File "{script}", line 1' in done.stdout
    assert "cannot be run as a script" not in done.stdout


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(num_points=10**9), "mm_fuser_num_points=1000000000 is not allowed; use a whole number from 1 to 256"),
        (
            dict(window_size=10**9 + 1),
            "mm_fuser_window_size=1000000001 is not allowed; use a whole number from 1 to 63",
        ),
        (dict(num_heads=10**30), "mm_fuser_num_heads=1000.* is not allowed; use a whole number from 1 to 1024"),
        (dict(projector="mlp1000000000x_gelu"), "mm_fuser_projector=.* with N from 1 to 99"),
        (dict(layers="3," + "9" * 5000), "is not a list of layers"),
        (dict(hidden_size=10**12), "hidden_size=1000000000000 is not allowed; use a whole number from 1 to 131072"),
        (dict(num_layers=10**9), "num_layers=1000000000 is not allowed; use a whole number from 2 to 1000"),
    ],
)
def test_every_number_has_a_bound(settings, message):
    from llava_mmfuser import MMFuser

    kind = MMFuser if {"hidden_size", "num_layers"} & set(settings) else MMFuserConfig
    with pytest.raises(ValueError, match=message):
        kind(**{**({"hidden_size": 64} if kind is MMFuser else {}), **settings})


def test_a_set_of_a_tower_that_is_too_deep_is_refused():
    with pytest.raises(ValueError, match="mm_fuser_layers=all .* more than 1000 layers"):
        Layers.parse_listed("all").resolve(10**9)
