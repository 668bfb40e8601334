"""Item text to representation: encoders, their cache, vectors files, and semantic ids.

An encoder is any callable from a list of n strings to an (n, d) float array:

    from mtcl_torchrec.text import HashedTfidf, ItemTexts, embed_items

    items = ItemTexts.open(["items.parquet"], columns=["title", "genres"], key="item_id")
    embed_items(items, HashedTfidf.fit(items.sample()), Path("vectors.parquet"))

`mtcl embed` and `mtcl semantic-ids` do the same from the command line.
"""

from mtcl_torchrec.text.cache import CachedEncoder
from mtcl_torchrec.text.codebook import Codebook, fit_codebook
from mtcl_torchrec.text.codebook_use import CodebookUse, codebook_use
from mtcl_torchrec.text.embed import Embedded, embed_items
from mtcl_torchrec.text.encoders import Encoder, open_encoder
from mtcl_torchrec.text.items import ItemTexts
from mtcl_torchrec.text.language_models import HuggingFaceEncoder, SentenceEncoder, WordLlamaEncoder
from mtcl_torchrec.text.tfidf import HashedTfidf

__all__ = [
    "CachedEncoder",
    "Codebook",
    "CodebookUse",
    "Embedded",
    "Encoder",
    "HashedTfidf",
    "HuggingFaceEncoder",
    "ItemTexts",
    "SentenceEncoder",
    "WordLlamaEncoder",
    "codebook_use",
    "embed_items",
    "fit_codebook",
    "open_encoder",
]
