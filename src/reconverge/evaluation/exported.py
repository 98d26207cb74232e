"""Opens exports for other tools, pt2 and ONNX, without running code of their author.

torch.export.load unpickles whatever is not plain (it falls back to weights_only=False), loads shared
libraries, looks up the functions of the graph by any name below torch and math, and evaluates symbolic sizes
as Python. So the archive is taken apart here: only members, operations, names and expressions on the lists
below are accepted, and torch gets a new archive of them. Of ONNX only its own operations are accepted, and no
tensors in other files.
"""

import io
import json
import re
import warnings
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn

from reconverge.base.errors import Exit, Stop
from reconverge.base.files import read_plain

PICKLE = "data/sample_inputs/model.pt"
MEMBERS = re.compile(
    r"data/weights/weight_\d+|data/constants/tensor_\d+"
    r"|data/(weights/model_weights|constants/model_constants)_config\.json|models/model\.json"
    r"|data/sample_inputs/model\.pt|archive_format|archive_version|byteorder"
    r"|\.data/(version|serialization_id)|\.format_version|\.storage_alignment"
)
# Operations: functions of tensors. What reads files, resizes or replaces memory is none of them.
OPERATION = re.compile(
    r"torch\.ops\.aten\.([a-z]\w*|_assert_tensor_metadata|_assert_scalar|_to_copy|_upsample_\w+_aa)\.\w+"
)
ARITHMETIC = re.compile(r"_operator\.(add|sub|mul|neg|floordiv|truediv|mod|pow|eq|ne|ge|gt|le|lt|getitem)")
NONE_OF = re.compile(r"from_file|set_\w*|set_data|resize\w*|as_strided\w*|record_stream|data|empty\w*")
# Symbolic sizes, as sympy writes them: no names but these, no attribute, no text but the name of a symbol.
PART = re.compile(
    r"Symbol\('[su]\d+'|(Symbol|Integer|Rational|Add|Mul|Pow|Max|Min|Mod|FloorDiv|CleanDiv|PythonMod|Eq|Ne|Ge"
    r"|Gt|Le|Lt)(?=\()|(positive|nonnegative|integer|real)=(True|False)|[su]?\d+|[(), -]|true|false|True"
    r"|False"
)
PLAIN = re.compile(r"[\w.+-]*")  # every other text: names, types, versions
SPECIFICATION = {None, "builtins.tuple", "builtins.list", "builtins.dict"}  # what the arguments are put in


def pt2(path: Path) -> nn.Module:
    """The module in an archive of torch.export. Errors: Stop(DAMAGED)."""
    try:
        members = _members(path)
        members["models/model.json"] = json.dumps(_graph(json.loads(members["models/model.json"]))).encode()
        for name in ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json"):
            _payloads(json.loads(members[name]), members, name)
        if not _is_plain(torch.load(io.BytesIO(members[PICKLE]), map_location="cpu", weights_only=True)):
            raise ValueError(f"{PICKLE} has more than tensors")
        archive = io.BytesIO()
        with ZipFile(archive, "w") as file:
            for name, content in members.items():
                file.writestr(f"model/{name}", content)
        archive.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(archive).module()
    except Stop:
        raise
    except Exception as error:  # torch raises nearly everything for an archive that it cannot read
        raise _refused(path, error) from None


def onnx(path: Path) -> bytes:
    """The contents of a file of ONNX, for onnxruntime. Errors: Stop(DAMAGED)."""
    from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, load_model_from_string

    def tensors(found: list[TensorProto]) -> None:
        if any(tensor.external_data or tensor.data_location == TensorProto.EXTERNAL for tensor in found):
            raise ValueError("some of its tensors are in another file")

    def graph(found: GraphProto) -> None:
        tensors([*found.initializer])
        tensors([part for one in found.sparse_initializer for part in (one.values, one.indices)])
        nodes([*found.node])

    def nodes(found: list[NodeProto]) -> None:
        for node in found:
            if node.domain not in ("", "ai.onnx"):
                raise ValueError(f"{node.domain}::{node.op_type} is not an operation of ONNX")
            for attribute in node.attribute:
                values(attribute)

    def values(found: AttributeProto) -> None:
        tensors([found.t, *found.tensors])
        for sparse in (found.sparse_tensor, *found.sparse_tensors):
            tensors([sparse.values, sparse.indices])
        for one in (found.g, *found.graphs):
            graph(one)

    content = read_plain(path)
    try:
        model = load_model_from_string(content)
        if model.functions or any(used.domain not in ("", "ai.onnx") for used in model.opset_import):
            raise ValueError("it has operations of its own")
        graph(model.graph)
    except Exception as error:  # protobuf raises its own
        raise _refused(path, error) from None
    return content


def _refused(path: Path, error: Exception) -> Stop:
    return Stop(
        Exit.DAMAGED,
        f"{path}: {str(error).partition(chr(10))[0] or type(error).__name__}; nothing of it was run",
        "a file as reconverge export writes it: tensors, and a graph of the tool's own operations",
        "export the model again",
    )


def _members(path: Path) -> dict[str, bytes]:
    """Name below the archive's folder -> contents. ValueError for what is none of an export."""
    found: dict[str, bytes] = {}
    try:
        with ZipFile(io.BytesIO(read_plain(path))) as file:
            for info in file.infolist():
                name = info.filename.partition("/")[2]
                if not MEMBERS.fullmatch(name) or name in found:
                    raise ValueError(f"{info.filename!r} is not a member of such an archive")
                if info.compress_type or info.file_size != info.compress_size:
                    raise ValueError(f"{info.filename!r} is compressed")
                found[name] = file.read(info)
    except (BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"no zip archive: {error}") from None
    for name in ("models/model.json", PICKLE):
        if name not in found:
            raise ValueError(f"{name} is missing")
    return found


def _payloads(config: Any, members: dict[str, bytes], where: str) -> None:
    """What a table of weights says of their members: bytes of tensors, none of them a pickle."""
    for name, payload in config["config"].items():
        member = f"{where.rpartition('/')[0]}/{payload['path_name']}"
        if payload["use_pickle"] or not payload["tensor_meta"] or member not in members:
            raise ValueError(f"{where}: {name} is not a plain tensor of this archive")
    _texts(config, where)


def _is_plain(content: Any) -> bool:
    """Whether what was unpickled is tensors and numbers in tuples, lists and tables."""
    if isinstance(content, tuple | list) and type(content) in (tuple, list):
        return all(map(_is_plain, content))
    if type(content) is dict:
        return all(type(key) in (str, int) and _is_plain(value) for key, value in content.items())
    return content is None or type(content) in (Tensor, int, float, bool, str)


def _graph(program: Any) -> Any:
    """The exported program without what is said of its origin. ValueError for what is on no list."""
    program["guards_code"] = []  # Python code, which torch would run
    for node in program["graph_module"]["graph"]["nodes"]:
        node["metadata"] = {}
        if any(key not in ("arg", "kind", "name") for given in node["inputs"] for key in given):
            raise ValueError("an input of the graph has another form")
    program["graph_module"]["metadata"] = {}
    _texts(program, "models/model.json")
    return program


def _texts(content: Any, where: str, key: str = "") -> None:
    """Hold every text in a table against the list of its kind, by the key that it stands under."""
    if isinstance(content, dict):
        for name, value in content.items():
            if not PLAIN.fullmatch(name) or name == "as_custom_obj" or name.startswith("as_graph"):
                raise ValueError(f"{where}: {name!r} is not allowed")
            _texts(value, where, name)
    elif isinstance(content, list):
        for value in content:
            _texts(value, where, key)
    elif isinstance(content, str) and not _allowed(content, key):
        raise ValueError(f"{where}: {key} {content[:80]!r} is not allowed")


def _allowed(text: str, key: str) -> bool:
    if key == "target":
        found = OPERATION.fullmatch(text)
        return bool(ARITHMETIC.fullmatch(text) or (found and not NONE_OF.fullmatch(found[1])))
    if key == "expr_str":
        return len(text) < 1000 and not PART.sub("", text)
    if key in ("in_spec", "out_spec"):
        version, specification = json.loads(text)
        return type(version) is int and _is_specification(specification)
    return bool(PLAIN.fullmatch(text))


def _is_specification(content: Any) -> bool:
    known = content.keys() == {"type", "context", "children_spec"} and content["type"] in SPECIFICATION
    context = json.loads(content["context"] or "null")
    words = context is None or (
        isinstance(context, list) and all(type(word) is str and PLAIN.fullmatch(word) for word in context)
    )
    return known and words and all(map(_is_specification, content["children_spec"]))
