"""What `check` finds wrong with a recipe's files, depths and devices before any weight is loaded."""

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from distill.checks import RecipeFacts, check
from distill.errors import UserError
from distill.recipe import load_recipe
from distill.weight_files import read_header, stored_tensors

STORIES = Path(__file__).parents[2].parent / "shared" / "teachers" / "stories260K"

Check = Callable[..., RecipeFacts]


def save_tokenizer(folder: Path, size: int, **special: str) -> None:
    """A word tokenizer with ids 0 .. size - 1, the first two of them <s> and </s>."""
    words = ["<s>", "</s>", "<unk>", *(f"w{number}" for number in range(size - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = special or {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special).save_pretrained(folder)


def tiny_config(**changes: object) -> LlamaConfig:
    sizes = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**{**sizes, **changes})


@pytest.fixture(scope="module")
def saved_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    save_tokenizer(folder, 250)
    return folder


@pytest.fixture
def teacher(saved_teacher: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved_teacher, tmp_path / "teachers" / "tiny"))


@pytest.fixture
def run_check(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some text\n")
    Path("small.yaml").write_text(
        "teacher: {path: teachers/tiny}\ndata: {source: text.txt, block: 64}\n"
        "stages: {hidden: {tokens: 10K, batch_size: 2}, logits: {tokens: 20K, batch_size: 8, micro_batch_size: 4}}\n"
    )

    def _check(*overrides: str, ranks: int = 1, zero: bool = False) -> RecipeFacts:
        return check(load_recipe(Path("small.yaml"), overrides), ranks=ranks, zero=zero)

    return _check


def test_facts(run_check: Check) -> None:
    facts = run_check("student.keep_attention={pattern: m a}")
    assert facts.n_layers == facts.config.num_hidden_layers == 4
    assert facts.kept == (1, 3)
    assert facts.steps == {"hidden": 10_000 // (2 * 64), "logits": 20_000 // (8 * 64)}
    assert (facts.vocab_size, facts.tokenizer_size) == (256, 250)
    assert run_check(ranks=2).steps == facts.steps
    assert not Path("runs").exists()  # checking writes nothing


def test_processes_must_share_a_step_evenly_unless_each_trains_layers_of_its_own(run_check: Check) -> None:
    said = "stages.hidden.batch_size is 2, which 4 processes cannot share evenly; 4 they can"
    with pytest.raises(UserError) as caught:
        run_check(ranks=4)
    assert str(caught.value) == said
    assert run_check("stages.hidden.parallel=layers", ranks=4).steps == run_check().steps
    with pytest.raises(UserError, match=r"logits\.batch_size is 8, which 3 processes cannot share evenly; 9 they can"):
        run_check("stages.hidden.parallel=layers", ranks=3)


def test_a_stage_counts_its_own_blocks(run_check: Check) -> None:
    assert run_check("stages.hidden.block=16").steps == {"hidden": 10_000 // (2 * 16), "logits": 20_000 // (8 * 64)}
    assert run_check("stages.hidden.block=64").steps == run_check().steps
    with pytest.raises(UserError, match=r"^stages\.hidden\.block: 128 does not divide data\.block"):
        run_check("stages.hidden.block=128")


def test_attention_is_lent_within_one_process(run_check: Check) -> None:
    assert run_check("stages.logits.stepwise={at: [0.0]}")
    with pytest.raises(UserError, match=r"logits\.stepwise: the teacher's attention is lent within one process, not 2"):
        run_check("stages.logits.stepwise={at: [0.0]}", ranks=2)
    with pytest.raises(UserError, match=r"logits\.stepwise: DeepSpeed takes a missing gradient for zero and decays"):
        run_check("stages.logits.stepwise={at: [0.0]}", zero=True)


def test_no_weight_is_read(run_check: Check, teacher: Path) -> None:
    """Zeros in place of the weights are as good."""
    file = teacher / "model.safetensors"
    n = struct.unpack("<Q", file.read_bytes()[:8])[0]
    file.write_bytes(file.read_bytes()[: 8 + n].ljust(file.stat().st_size, b"\xff"))
    run_check()


@pytest.mark.skipif(not STORIES.is_dir(), reason="the public teacher is not beside the checkout")
def test_a_public_teacher(run_check: Check) -> None:
    facts = run_check(f"teacher.path={STORIES}", "student.keep_attention=[2]")
    assert (facts.n_layers, facts.kept, facts.vocab_size, facts.tokenizer_size) == (5, (2,), 512, 512)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["student.keep_attention=[4]"], "student.keep_attention names layer 4; the teacher has 4 layers"),
        (["student.keep_attention={count: 5}"], "student.keep_attention.count is 5; the teacher has 4 layers"),
        (
            ["student.keep_heads={1: [4]}"],
            "student.keep_heads has [4] in layer 1; give at least one of the heads 0 to 3",
        ),
        (
            ["student.keep_attention=[1]", "student.keep_heads={1: [0]}"],
            "student.keep_heads names layer 1, which keeps attention",
        ),
        (
            ["student.keep_heads={1: [0, 1, 2, 3]}", "stages.mixing.tokens=10K"],
            "student.keep_heads has all 4 heads of layer 1, which leaves nothing there for mixing to match",
        ),
        (["student.keep_attention={ratio: 1.0}"], "student.keep_attention leaves nothing for hidden to train"),
        (["student.rope=keep", "student.state_dim=4"], "student.rope is keep and state_dim 4, but the teacher turns 8"),
        (
            ["student.mixer=gated_deltanet", "stages.mixing={tokens: 1024, batch_size: 2}"],
            "stages.mixing: not for gated_deltanet: the delta",
        ),
        (
            ["student.mixer=sliding_window", "stages.hidden.target=heads"],
            "stages.hidden: target: heads is not for sliding_window",
        ),
        (
            ["student.window_layers=[1]", "stages.hidden.target=heads"],
            "stages.hidden: target: heads is not for window_layers",
        ),
        (["student.window=8"], "student.window and sinks are for student.mixer: sliding_window, not mamba2"),
        (["student.window_layers=[4]"], "student.window_layers names layer 4; the teacher has 4 layers"),
        (
            ["student.window_layers=[1, 3]", "student.keep_attention={pattern: m a}"],
            "student.window_layers names layer 1, 3, which keeps attention",
        ),
        (["data.block=65"], "data.block: 65 tokens are more than the 64 positions that the teacher knows"),
        (["stages.hidden.tokens=100"], "stages.hidden.tokens: 100 tokens are less than one step of 128"),
        (["stages.hidden.block=24"], "stages.hidden.block: 24 does not divide data.block, which is 64; take 16, or"),
        (
            ["stages.logits.stepwise={at: [0.0]}", "teacher.dtype=bfloat16"],
            "stages.logits.stepwise: attention must compute as its student does; teacher.dtype is bfloat16, dtype",
        ),
        (["data.source=none.txt"], "data.source 'none.txt': no such file or folder"),
        (["data.training_only=none.jsonl"], "data.training_only 'none.jsonl': no such file or folder"),
        (["data.source=[text.txt, binary.txt]"], "data.source: binary.txt: is a binary file"),
        (["data.source=empty.txt"], "data.source: empty.txt: the file is empty"),
        (["run_dir=text.txt/run"], "text.txt is a file, so text.txt/run cannot be a folder"),
        (["teacher.path=teachers/tinny"], "teacher.path: no folder teachers/tinny here"),
        (["teacher.path=teachers"], "teacher.path: teachers has no config.json"),
        (["teacher.path=/none/such"], "teacher.path: no folder /none/such here"),
    ],
)
def test_mistakes(run_check: Check, overrides: list[str], said: str) -> None:
    Path("binary.txt").write_bytes(b"a\0b")
    Path("empty.txt").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        run_check(*overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_teacher_lists_those_beside_it(run_check: Check) -> None:
    with pytest.raises(UserError, match=r"models in teachers: tiny"):
        run_check("teacher.path=teachers/tinny")


def test_what_can_only_be_a_hub_id_is_asked_for(run_check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def offline(name: str) -> None:
        asked.append(name)
        raise OSError("We couldn't connect to the Hub\nand more")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", offline)
    with pytest.raises(UserError, match=r"^teacher\.path: the config of org/name cannot be read: We couldn't connect"):
        run_check("teacher.path=org/name")
    for local in ("teachers/name", "org/name/more", "./org", "org/"):
        with pytest.raises(UserError, match=r"^teacher\.path: no folder"):
            run_check(f"teacher.path={local}")
    assert asked == ["org/name"]


def test_what_is_to_be_exported_can_be(run_check: Check) -> None:
    assert run_check("student.exportable=granite", "student.keep_attention=[2]").kept == (2,)
    with pytest.raises(UserError) as error:
        run_check("student.exportable=bamba", "student.mixer=discrete_mamba2")
    assert str(error.value).splitlines() == [
        "student.exportable: bamba (BambaForCausalLM) cannot say this student:",
        "  layers 0, 1, 2, 3: discrete_mamba2 mixers; set student.mixer: mamba2",
        "  no layer keeps attention, which BambaForCausalLM does not run without;"
        " keep one, such as student.keep_attention: [3]",
    ]
    with pytest.raises(UserError, match="a WordLevel tokenizer has no counterpart"):
        run_check("student.exportable=gguf", "student.keep_attention=[2]")


def test_all_mistakes_come_together(run_check: Check, teacher: Path) -> None:
    (teacher / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        run_check("data.source=none.txt", "data.block=65", "student.keep_attention=[9]", "run_dir=text.txt")
    keys = [line.split(" ")[0] for line in str(caught.value).splitlines()]
    assert keys == ["run_dir:", "data.source", "student.keep_attention", "data.block:", "teacher.path:"]


def test_cuda_needs_a_gpu(run_check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device: no CUDA device is visible"):
        run_check("device=cuda")
    run_check("device=auto", "dtype=bfloat16")


def test_trackers_must_be_installed(run_check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="trackers: tracker 'tensorboard' is not installed"):
        run_check("trackers=[tensorboard]")


def test_run_dir_must_be_writable(run_check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by chmod: root, as in a container, may write anywhere.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"run_dir: .* may not be written to"):
        run_check()


@pytest.mark.parametrize("cut", [1, 100, -10, -100_000])
def test_truncated_weights(run_check: Check, teacher: Path, cut: int) -> None:
    file = teacher / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"teacher\.path: .*model\.safetensors.*download it again"):
        run_check()


def test_too_long_weights(run_check: Check, teacher: Path) -> None:
    with (teacher / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(UserError, match="is too long"):
        run_check()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"", "is not a whole safetensors file"),
        (struct.pack("<Q", 2**62) + b"{}", "is not a whole safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "is not a whole safetensors file"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "is not a whole safetensors file"),
        (struct.pack("<Q", 4) + b"\xff\xff\xff\xff", "is not a whole safetensors file"),
    ],
)
def test_files_that_are_not_safetensors(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=said):
        stored_tensors(tmp_path)


def test_headers_say_what_is_stored(saved_teacher: Path) -> None:
    stored = read_header(saved_teacher / "model.safetensors")
    expected = LlamaForCausalLM.from_pretrained(saved_teacher).state_dict()
    expected.pop("lm_head.weight")  # tied, so it is stored once
    assert {name: facts.shape for name, facts in stored.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    assert sum(facts.n_bytes for facts in stored.values()) == sum(tensor.nbytes for tensor in expected.values())
    assert {facts.dtype for facts in stored.values()} == {"F32"}


def test_shards(run_check: Check, teacher: Path) -> None:
    whole = stored_tensors(teacher)
    (teacher / "model.safetensors").unlink()
    LlamaForCausalLM(tiny_config()).save_pretrained(teacher, max_shard_size="40KB")
    shards = sorted(teacher.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert stored_tensors(teacher) == whole
    run_check()

    shards[1].rename(teacher / "elsewhere")
    with pytest.raises(UserError, match=rf"lacks 1 of {len(shards)} shards: {shards[1].name}"):
        run_check()
    shutil.copy(shards[0], shards[1])
    with pytest.raises(UserError, match=rf"{shards[1].name} lacks .* which model.safetensors.index.json places there"):
        run_check()
    (teacher / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match="is not readable JSON"):
        run_check()
    (teacher / "model.safetensors.index.json").unlink()
    (teacher / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds no weights.*it has pytorch_model\.bin, save it as safetensors"):
        run_check()


def test_a_checkpoint_of_another_shape(run_check: Check, teacher: Path) -> None:
    LlamaForCausalLM(tiny_config(intermediate_size=48)).model.save_pretrained(teacher)  # the bare decoder
    run_check()
    tiny_config().save_pretrained(teacher)
    with pytest.raises(UserError, match=r"gate_proj\.weight has shape \[48, 32\] in .* and \[64, 32\] by its config"):
        run_check()
    tiny_config(intermediate_size=48, num_hidden_layers=5).save_pretrained(teacher)
    with pytest.raises(UserError, match=r"lacks model\.layers\.4\..* and 8 more"):
        run_check()
    tiny_config(intermediate_size=48, tie_word_embeddings=False).save_pretrained(teacher)
    with pytest.raises(UserError, match=r"lacks lm_head\.weight;"):
        run_check()


@pytest.mark.parametrize(
    ("size", "vocab_size", "allowed"),
    [
        (256, 256, True),
        (257, 256, False),
        (250, 256, True),
        (129, 256, True),  # padded to a multiple of 128
        (128, 129, True),  # padded by less than 10 %
        (128, 256, False),
        (1000, 1100, True),
        (1000, 1101, False),
    ],
)
def test_vocabularies(run_check: Check, teacher: Path, size: int, vocab_size: int, allowed: bool) -> None:
    LlamaForCausalLM(tiny_config(vocab_size=vocab_size)).save_pretrained(teacher)
    save_tokenizer(teacher, size)
    if allowed:
        assert run_check().tokenizer_size == size
    else:
        with pytest.raises(UserError, match=rf"the tokenizer has {size} tokens .* a vocabulary of {vocab_size}"):
            run_check()


def test_an_id_beyond_the_vocabulary(run_check: Check, teacher: Path) -> None:
    path = teacher / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["w5"] = 999
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"the tokenizer has 250 tokens \(the largest id is 999\)"):
        run_check()


def test_tokenizers_that_cannot_be_used(run_check: Check, teacher: Path) -> None:
    save_tokenizer(teacher, 250, eos_token="</s>")
    with pytest.raises(UserError, match=r"^data\.bos: the teacher's tokenizer has no BOS token; set it to false$"):
        run_check()
    run_check("data.bos=false", "data.eos=true")
    (teacher / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"teacher\.path: the tokenizer of teachers/tiny cannot be read"):
        run_check()
    (teacher / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"teacher\.path: teachers/tiny has no tokenizer"):
        run_check()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "the config of teachers/tiny cannot be read"),
        ('{"model_type": "no-such-thing"}', "the config of teachers/tiny cannot be read"),
        ('{"model_type": "llama", "num_hidden_layers": "x"}', "the config of teachers/tiny cannot be read"),
        ('{"model_type": "falcon", "alibi": true}', "this falcon has ALiBi"),
        ('{"model_type": "llama", "distill": {}}', "is already a student"),
    ],
)
def test_configs_that_cannot_be_used(run_check: Check, teacher: Path, config: str, said: str) -> None:
    (teacher / "config.json").write_text(config)
    with pytest.raises(UserError, match=f"teacher.path: .*{said}"):
        run_check()


def test_another_family(run_check: Check, teacher: Path) -> None:
    config = Qwen2Config(**{key: value for key, value in tiny_config().to_dict().items() if key != "model_type"})
    from transformers import Qwen2ForCausalLM

    Qwen2ForCausalLM(config).save_pretrained(teacher)
    assert run_check().config.model_type == "qwen2"
