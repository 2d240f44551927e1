"""Damaged and hostile folders: each is refused in one line, before any weight is read, whatever it claims to be."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from mmdata.errors import DataError
from mmtrain.checkpoint.run_folder import Start
from mmtrain.errors import ConfigError
from mmtrain.hf.folder import open_folder
from mmtrain.hf.tokenizer_files import TextFiles
from mmtrain.train.resume import weights_record
from tests.hf.folders import SHARED, made, write

BIG = 1 << 62
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(made(SHARED), tmp_path_factory.mktemp("whole") / "m", "minimax", shard_bytes=60_000)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of a whole folder of several files."""
    (tmp_path / "m").mkdir()
    for path in whole.iterdir():
        (tmp_path / "m" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "m"


def refusal(folder: Path) -> str:
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError) as refused:
            open_folder("run.init_from", folder)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20  # Python's, at its peak
    finally:
        tracemalloc.stop()
    line = str(refused.value)
    assert "\n" not in line and len(line) < 700 and line.startswith(f"run.init_from={folder}: ")
    return line


def edit(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_header(path: Path, change: Callable[[dict], object], pad: int = 0) -> None:
    """Change the header of a safetensors file; its data stay."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def first(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def tensor(header: dict, number: int = 0) -> dict:
    return header[[name for name in header if name != "__metadata__"][number]]


def in_index(value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edit(folder / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": value}))

    return change


def in_config(**values: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", lambda config: config.update(values))


def in_header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: edit_header(first(folder), change)


def write_raw(name: str, raw: bytes) -> Callable[[Path], object]:
    return lambda folder: (first(folder) if name == "shard" else folder / name).write_bytes(raw)


def drop_tensor(folder: Path) -> None:
    edit(folder / INDEX, lambda index: index["weight_map"].pop("model.layers.0.input_layernorm.weight"))


def cut(folder: Path) -> None:
    first(folder).write_bytes(first(folder).read_bytes()[:-7])


def overlap(header: dict) -> None:
    """The second tensor at the first bytes of the first."""
    begin, end = tensor(header, 1)["data_offsets"]
    tensor(header, 1)["data_offsets"] = [0, end - begin]


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "traversal": (in_index("../../etc/model.safetensors"), "names a file outside the folder"),
    "absolute": (in_index("/etc/model.safetensors"), "names a file outside the folder"),
    "hidden": (in_index(".model.safetensors"), "names a file outside the folder"),
    "no file of weights": (in_index("config.json"), "names a file outside the folder, or no file of weights"),
    "two lines": (in_index("a\n.safetensors"), "names a file outside the folder"),
    "long name": (in_index("a" * 300_000 + ".safetensors"), "names a file outside the folder"),
    "not a text": (in_index(3), "names a file outside the folder"),
    "missing shard": (lambda folder: first(folder).unlink(), "is missing"),
    "another file's tensor": (lambda folder: in_index(first(folder).name)(folder), "does not hold 'lm_head.weight'"),
    "tensor not in the index": (drop_tensor, "which model.safetensors.index.json does not say"),
    "index of nothing": (write_raw(INDEX, b"{}"), "has no weight_map"),
    "index is deep": (write_raw(INDEX, b"[" * 200_000), "is not JSON"),
    "index is large": (write_raw(INDEX, b" " * (33 << 20)), "bytes, 33,554,432 are allowed"),
    "a key twice": (write_raw(INDEX, b'{"weight_map": {}, "weight_map": {}}'), "twice"),
    "shard is a pickle": (write_raw("shard", pickle.dumps({"a": 1})), "no safetensors file"),
    "shard is empty": (write_raw("shard", b""), "no safetensors file"),
    "header beyond the file": (write_raw("shard", BIG.to_bytes(8, "little") + b"{}"), "no safetensors file"),
    "header of 17 MiB": (lambda folder: edit_header(first(folder), lambda header: None, 17 << 20), "has a header of"),
    "cut short": (cut, "is cut short"),
    "too long": (lambda folder: first(folder).open("ab").write(b"x" * 64) or first(folder), "is too long"),
    "absurd shape": (in_header(lambda h: tensor(h).update(shape=[BIG, BIG])), "a shape or offsets that cannot be"),
    "shape of another size": (in_header(lambda h: tensor(h).update(shape=[3, 5])), "and a shape of 15 elements"),
    "negative shape": (in_header(lambda h: tensor(h).update(shape=[-1])), "a shape or offsets that cannot be"),
    "bool for a shape": (in_header(lambda h: tensor(h).update(shape=[True])), "a shape or offsets that cannot be"),
    "hundred dimensions": (in_header(lambda h: tensor(h).update(shape=[1] * 100)), "a shape or offsets that cannot be"),
    "unknown dtype": (in_header(lambda h: tensor(h).update(dtype="object")), "in the unknown dtype 'object'"),
    "integers": (in_header(lambda h: tensor(h).update(dtype="I32")), "in I32; F32, BF16, F16 are read"),
    "overlap": (in_header(overlap), "overlaps the one before it"),
    "shift": (in_header(lambda h: tensor(h).update(data_offsets=[4, tensor(h)["data_offsets"][1] + 4])), "hole"),
    "backwards": (in_header(lambda h: tensor(h).update(data_offsets=[8, 0])), "bytes, and a shape of"),
    "more than is said": (in_header(lambda h: tensor(h).update(code="x")), "does not say dtype, shape"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: No such file"),
    "other model": (in_config(model_type="llama"), "'minimax_text_01' and 'minimax' are known"),
    "absurd layers": (in_config(num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
    "many layers": (in_config(num_hidden_layers=4000, attn_type_list=[0] * 4000), "describes a model of more than"),
    "absurd experts": (in_config(num_local_experts=1e9), "num_local_experts=1000000000.0"),
    "wide": (in_config(hidden_size=1 << 31), "config.json says [160, 2147483648]"),
    "beyond torch": (in_config(hidden_size=1 << 32, vocab_size=1 << 32), "describes a model that cannot be"),
    "many heads": (in_config(num_attention_heads=1 << 31), "num_attention_heads=2147483648"),
    "many key heads": (in_config(num_key_value_heads=1 << 31), "num_key_value_heads=2147483648"),
    "wide heads": (in_config(head_dim=1 << 31), "head_dim=2147483648"),
    "beyond a float": (in_config(rope_theta=10**400), "beyond a float"),
    "unknown layers": (in_config(attn_type_list=[0, 2]), "no attn_type_list of 2 layers"),
    "layers of lists": (in_config(attn_type_list=[[], {}]), "no attn_type_list of 2 layers"),
    "infinite": (in_config(rope_theta=float("inf")), "rope_theta=inf"),
    "tied": (in_config(tie_word_embeddings=True), "tie_word_embeddings=True; only False is known"),
    "quantised": (in_config(quantization_config={}), "quantised"),
    "beta": (in_config(layernorm_mlp_beta=0.5), "layernorm_mlp_beta=0.5; our model has no such factor"),
    "alphas": (in_config(layernorm_mlp_alpha=2.0), "our model has one for all"),
    "heads": (in_config(num_key_value_heads=3), "describes a model that cannot be (model.num_kv_heads=3"),
    "rope": (in_config(rope_scaling={"type": "yarn"}), "rope_scaling"),
    "own entry": (in_config(mmtrain=[1]), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_it_is_refused_in_a_line(case: str, folder: Path) -> None:
    change, told = HOSTILE[case]
    change(folder)
    if told:
        assert told in refusal(folder)
    else:
        open_folder("run.init_from", folder)


def test_pickled_weights_are_never_read(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    assert "pickled" in refusal(folder)


def test_a_tensor_in_two_files_is_refused_without_an_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / "z.safetensors").write_bytes(first(folder).read_bytes())
    assert "both hold" in refusal(folder)


def test_reordered_rows_of_other_frequencies_are_refused(tmp_path: Path) -> None:
    folder = write(made(dict(num_layers=1, layer_pattern="S", rotary_dim=8)), tmp_path / "m")
    assert open_folder("x", folder).reordered
    edit(folder / "config.json", lambda config: config["mmtrain"].update(rotary_dim=4))
    assert "other frequencies" in refusal(folder)
    edit(folder / "config.json", lambda config: config.pop("mmtrain"))
    assert "RoPE of the type 'longrope'" in refusal(folder)


def test_other_files_that_cost_the_stack_are_garbage(folder: Path) -> None:
    for name in ("tokenizer.json", "generation_config.json"):
        (folder / name).write_text("[" * 100_000)
    assert TextFiles.of_folder(open_folder("x", folder)).eos is None
    with pytest.raises(DataError, match=r"tokenizer.json is not a usable tokenizer.json \(RecursionError\)"):
        weights_record(Start(weights=folder))
