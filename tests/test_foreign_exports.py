"""Exports, timm folders and pages of runs that may come from somebody else: nothing of them is run, nothing
is written through their links, and nothing else of this computer gets into a page.
"""

import base64
import io
import json
import os
import pickle
import shutil
from hashlib import sha256
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from conftest import trained
from safetensors.torch import load_file, save_file

MODEL = ["model=timm", "model.timm=test_convnext", "run=a", "ema.decay=0.9"]


@pytest.fixture(scope="module")
def exported(digits, tmp_path_factory, cache):
    """runs/a, with an export of each form in it."""
    from reconverge.commands.export import FORMS
    from reconverge.evaluation import export
    from reconverge.run.reader import opened

    given = [*MODEL, "steps=2", "evaluate_every=0", f"data.root={digits}"]
    runs = trained(tmp_path_factory.mktemp("exported"), cache, *given)
    of = opened(runs / "a")
    weights = export.choose(runs / "a", of, None, False, 1)
    for form in FORMS:
        export.export(of, weights, form, runs / "a" / f"export-{form}", "other")
    return runs


@pytest.fixture
def run(exported):
    shutil.copytree(exported, "runs")
    return Path("runs/a")


def signed(folder):
    """The hashes of export.json made anew."""
    about = json.loads((folder / "export.json").read_text())
    about["files"] = {name: sha256((folder / name).read_bytes()).hexdigest() for name in about["files"]}
    write_signed(folder / "export.json", about)


def write_signed(path, about):
    """export.json with its own hash made anew."""
    about.pop("sha256")
    about["sha256"] = sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(about))


def members(path):
    with ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def archive(path, content):
    with ZipFile(path, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def refused(reconverge, folder, words=""):
    signed(folder)
    code, said = reconverge("export", "--check", folder)
    assert (code, words in said, "Traceback" in said) == (65, True, False), said
    assert not Path("ran").exists()


@pytest.mark.parametrize("form", ["timm", "safetensors", "onnx", "pt2"])
def test_untouched_exports_are_good(run, reconverge, form):
    code, said = reconverge("export", "--check", run / f"export-{form}")
    assert code == 0, said


def test_no_pickle_in_any_member_of_a_pt2_is_loaded(run, reconverge):
    folder = run / "export-pt2"
    content = members(folder / "model.pt2")
    saved = io.BytesIO()
    torch.save(Payload(), saved)
    kinds = {name.rstrip("0123456789"): name for name in content}  # one of the hundred weights
    added = ["data/weights/model.pt", "data/constants/model.pt", "data/constants/opaque_obj_0"]
    added += [
        "data/constants/custom_obj_0",
        "extra/x.pt",
        "data/aotinductor/m/m.so",
        "models/b.json",
        "v.pkl",
    ]
    for name in [
        *kinds.values(),
        *(f"model/{name}" for name in added),
        "serialized_state_dict.pt",
        "version",
    ]:
        for payload in (saved.getvalue(), pickle.dumps(Payload())):
            if name.rstrip("0123456789") == "model/data/weights/weight_" and len(payload) >= len(
                content[name]
            ):
                continue
            archive(folder / "model.pt2", content | {name: payload})
            signed(folder)
            code, said = reconverge("export", "--check", folder)
            harmless = name.endswith(("serialization_id", "byteorder", ".data/version"))  # never unpickled
            assert code == 65 or (harmless and code == 0), (name, said)
            assert not Path("ran").exists(), name


def edited(folder, name, edit):
    content = members(folder / "model.pt2")
    table = json.loads(content[f"model/{name}"])
    edit(table)
    archive(folder / "model.pt2", content | {f"model/{name}": json.dumps(table).encode()})


CODE = "__import__('pathlib').Path('ran').touch()"


@pytest.mark.parametrize("key", ["use_pickle", "path_name"])
def test_weights_of_a_pt2_are_no_pickles_and_in_the_archive(run, reconverge, key):
    def edit(table):
        next(iter(table["config"].values()))[key] = {"use_pickle": True, "path_name": "../../x"}[key]

    edited(run / "export-pt2", "data/weights/model_weights_config.json", edit)
    refused(reconverge, run / "export-pt2", "is not a plain tensor")


def symbols(table):
    """The tables {"expr_str": ...} of a graph."""
    if isinstance(table, dict) and "expr_str" in table:
        yield table
    for value in table.values() if isinstance(table, dict) else table if isinstance(table, list) else ():
        yield from symbols(value)


@pytest.mark.parametrize(
    "expression",
    [CODE, "Symbol('s77').__class__", "s77.func", "[].append", "Symbol('x')", "1" * 2000, "9**9"],
)
def test_sizes_of_a_pt2_are_no_code(run, reconverge, expression):
    def edit(table):
        for found in symbols(table):
            found["expr_str"] = expression

    edited(run / "export-pt2", "models/model.json", edit)
    refused(reconverge, run / "export-pt2", "expr_str")


@pytest.mark.parametrize(
    "target",
    [
        *("torch.os.system", "torch.hub.load", "torch.ops.aten.from_file.default", "math.sin", "#x.y"),
        *("torch.ops.load_library", "torch.ops.higher_order.cond", "_operator.attrgetter", "_operator.call"),
        "torch.ops.aten.set_.source",
    ],
)
def test_operations_of_a_pt2_are_torchs(run, reconverge, target):
    def edit(table):
        node = table["graph_module"]["graph"]["nodes"][-1]
        node["target"] = target
        node["inputs"] = [{"name": "", "arg": {"as_string": "touch ran"}, "kind": 1}]

    edited(run / "export-pt2", "models/model.json", edit)
    refused(reconverge, run / "export-pt2", "is not allowed")


def test_guards_and_names_of_a_pt2_are_no_code(run, reconverge):
    folder = run / "export-pt2"
    whole = (folder / "model.pt2").read_bytes()

    def guards(table):
        table["guards_code"] = [CODE]
        for node in table["graph_module"]["graph"]["nodes"]:
            node["metadata"] = {"stack_trace": f"x\n{CODE}", "source_fn_stack": f"x,{CODE}", "custom": "{"}

    edited(folder, "models/model.json", guards)
    signed(folder)
    assert reconverge("export", "--check", folder)[0] == 0  # they are left out
    assert not Path("ran").exists()
    for name in ("x): pass", f"x={CODE}", "a\nb"):
        (folder / "model.pt2").write_bytes(whole)

        def rename(table, name=name):
            table["graph_module"]["graph"]["nodes"][0]["name"] = name

        edited(folder, "models/model.json", rename)
        refused(reconverge, folder, "is not allowed")


def test_onnx_has_no_operations_of_its_own_and_no_other_files(run, reconverge):
    import onnx

    folder = run / "export-onnx"
    whole = onnx.load(folder / "model.onnx")

    def own_domain(model):
        model.graph.node[0].domain = "com.microsoft"

    def inside(model):
        graph = onnx.helper.make_graph([onnx.helper.make_node("Op", [], [], domain="own")], "g", [], [])
        model.graph.node[0].attribute.append(onnx.helper.make_attribute("body", graph))

    def imported(model):
        model.opset_import.append(onnx.helper.make_opsetid("own", 1))

    def outside(model):
        tensor = model.graph.initializer[0]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../../../secret")

    for edit in (own_domain, inside, imported, outside):
        model = onnx.ModelProto()
        model.CopyFrom(whole)
        edit(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        refused(reconverge, folder, "nothing of it was run")
    (folder / "model.onnx").write_bytes(b"no onnx")
    refused(reconverge, folder)


@pytest.mark.parametrize("form", ["timm", "safetensors", "onnx", "pt2"])
def test_an_export_that_leaves_out_a_file_is_damaged(run, reconverge, form):
    path = run / f"export-{form}" / "export.json"
    whole = json.loads(path.read_text())
    for name in whole["files"]:
        if name == "README.md":
            continue
        write_signed(path, whole | {"files": {k: v for k, v in whole["files"].items() if k != name}})
        code, said = reconverge("export", "--check", path.parent)
        assert (code, f"leaves out {name}" in said) == (65, True), said
    Path("secret").write_text("x")
    digest = sha256(b"x").hexdigest()
    path.write_text(json.dumps(whole | {"files": whole["files"] | {"../../../secret": digest}}))
    assert reconverge("export", "--check", path.parent)[0] == 65


@pytest.mark.parametrize("change", ["none", "broadcast", "type", "missing"])
def test_an_example_that_shows_nothing_is_damaged(run, reconverge, change):
    folder = run / "export-safetensors"
    example = load_file(folder / "example.safetensors")
    if change == "none":
        example = {name: tensor[:0] for name, tensor in example.items()}
    elif change == "broadcast":
        example["logits"] = example["logits"][:, :1]
    elif change == "type":
        example["logits"] = example["logits"].double()
    else:
        del example["logits"]
    save_file({name: tensor.contiguous() for name, tensor in example.items()}, folder / "example.safetensors")
    refused(reconverge, folder)


# ---- timm folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        ({"pretrained_strict": False}, {}),
        ({"cache_dir": "elsewhere"}, {}),
        ({"features_only": True}, {}),
        ({"act_layer": {"a": 1}}, {}),
        ({"drop_rate": float("nan")}, {}),
        ({"num_classes": 11}, {}),
        ({}, {"num_classes": 11}),
        ({}, {"custom_load": "hf"}),
        ({}, {"label_offset": 1}),
    ],
)
def test_a_config_of_timm_asks_for_a_model_and_nothing_else(run, evaluate, arguments, known):
    path = run / "export-timm" / "config.json"
    config = json.loads(path.read_text())
    config["model_args"] |= arguments
    config["pretrained_cfg"] |= known
    path.write_text(json.dumps(config))
    assert evaluate("checkpoint=runs/a/export-timm", "data=digits", "workers=0") == 65


@pytest.mark.parametrize("change", ["int8", "bool", "infinite", "huge"])
def test_weights_of_timm_are_finite_numbers(run, evaluate, capsys, change):
    path = run / "export-timm" / "model.safetensors"
    tensors = load_file(path)
    old = tensors["stem.0.bias"]
    tensors["stem.0.bias"] = {
        "int8": old.to(torch.int8),
        "bool": old.bool(),
        "infinite": torch.full_like(old, float("inf")),
        "huge": torch.full_like(old, 1.0).double() * 1e300,
    }[change]
    save_file(tensors, path)
    assert evaluate("checkpoint=runs/a/export-timm", "data=digits", "workers=0") == 65
    assert "stem.0.bias" in capsys.readouterr().err


# ---- links -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["timm", "safetensors", "onnx", "pt2"])
def test_an_export_is_written_through_no_link(run, reconverge, form):
    folder = run / f"export-{form}"
    names = [path.name for path in folder.iterdir()]
    Path("target").write_text("of somebody")
    for name in names:
        if name != "export.json":
            (folder / name).unlink()
            (folder / name).symlink_to(Path("target").resolve())
    code, said = reconverge("export", run, "--to", form)
    assert code == 0, said
    assert Path("target").read_text() == "of somebody"
    assert not any((folder / name).is_symlink() for name in names)
    shutil.move(folder, "elsewhere")
    folder.symlink_to(Path("elsewhere").resolve())
    before = {path: path.read_bytes() for path in Path("elsewhere").iterdir()}
    assert reconverge("export", run, "--to", form)[0] == 65
    assert before == {path: path.read_bytes() for path in Path("elsewhere").iterdir()}


SECRET = "the secret of somebody"


@pytest.mark.parametrize("how", ["link", "pipe", "copy"])
def test_a_page_has_no_picture_but_a_plain_one_of_the_run(run, reconverge, how):
    path = run / "first_batch.png"
    path.unlink()
    Path("secret").write_text(SECRET)
    if how == "link":
        path.symlink_to(Path("secret").resolve())
    elif how == "pipe":
        os.mkfifo(path)
    else:
        path.write_text(SECRET)
    code, said = reconverge("report", run)
    assert code == 0, said
    page = (run / "report.html").read_text()
    assert SECRET not in page
    assert base64.b64encode(SECRET.encode()).decode()[:16] not in page


@pytest.mark.parametrize("name", ["classes.txt", "config.yaml", "status.json", "environment.json"])
@pytest.mark.parametrize("command", ["report", "export"])
def test_what_a_page_shows_is_no_link(run, reconverge, name, command):
    shutil.move(run / name, "elsewhere")
    (run / name).symlink_to(Path("elsewhere").resolve())
    code, said = reconverge(command, run, *(["--to", "safetensors"] if command == "export" else []))
    if command == "export" and name == "status.json":
        return
    assert (code, f"{name} is a link" in said) == (65, True), said


def test_a_page_is_written_through_no_link(run, reconverge):
    Path("target").write_text("of somebody")
    for name in ("report.html", ".report.html.new"):
        (run / name).symlink_to(Path("target").resolve())
    code, said = reconverge("report", run)
    assert code == 0, said
    assert Path("target").read_text() == "of somebody"
    assert "<html" in (run / "report.html").read_text()


def test_pictures_and_results_are_written_through_no_link(run, digits, evaluate):
    arguments = ["checkpoint=runs/a", "data=folder", f"data.root={digits}", "workers=0"]
    assert evaluate(*arguments) == 0
    (result,) = run.glob("eval-*.json")
    Path("target").write_text("of somebody")
    for path in (result, Path("predictions.csv"), Path("predicted.png")):
        path.unlink(missing_ok=True)
        path.symlink_to(Path("target").resolve())
    assert evaluate(*arguments) == 0
    assert evaluate("checkpoint=runs/a", f"images={digits}/val", "workers=0") == 0
    assert Path("target").read_text() == "of somebody"


def test_a_run_of_somebody_names_no_folder_to_write_to(run, reconverge, evaluate):
    text = (run / "config.yaml").read_text()
    line = next(line for line in text.splitlines() if line.strip().startswith("cache:"))
    (run / "config.yaml").write_text(text.replace(line, f"  cache: {Path('planted').resolve()}"))
    assert reconverge("report", run)[0] == 0
    assert evaluate("checkpoint=runs/a", "workers=0") == 0
    assert not Path("planted").exists()


def test_outcomes_are_no_pickles(run, reconverge):
    content = dict(np.load(run / "outcomes.npz"))
    content["labels"] = np.array([Payload()], dtype=object)
    np.savez(run / "outcomes.npz", **content)
    assert reconverge("report", run)[0] == 65
    assert not Path("ran").exists()
