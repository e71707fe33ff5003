"""Makes small unigram and WordPiece vocabularies, and what their own tokenizers make of texts.

    pip install sentencepiece==0.2.3 protobuf 'transformers==4.57.6' tokenizers==0.22.2
    python tests/golden/make_tokenizers.py

Writes tokenizers.json: for each tokenizer the metadata as a GGUF file has it, and `{text, ids}` cases without special
tokens. Unigram ids are by SentencePiece, WordPiece ids by transformers' slow BertTokenizer, which is Python. Where its
fast one, the `tokenizers` crate's, says something else, there is no case: the slow one composes characters (NFC) where
neither BERT's first tokenizer nor the fast one does.
"""
import io
import json
import tempfile
from pathlib import Path

import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as pb
from tokenizers import BertWordPieceTokenizer
from transformers import BertTokenizer

HERE = Path(__file__).parent
CORPUS = (HERE.parent.parent / "LICENSE").read_text().splitlines() + [
    "The quick brown fox jumps over the lazy dog.", "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Le cœur déçu mais l'âme plutôt naïve, Louÿs rêva de crapaüter en canoë.", "El pingüino Wenceslao hizo kilómetros.",
    "В чащах юга жил бы цитрус? Да, но фальшивый экземпляр!", "古池や 蛙飛びこむ 水の音", "夏草や 兵どもが 夢の跡",
    "print(x[0] + 12345, 'it''s') # 3.14159", "naïve café résumé coöperate Ångström", "٢٣ كتاب على الطاولة",
] * 20
TEXTS = [
    "", " ", "   ", "a", "Hello world", "  two  spaces   in between ", "The Licensor grants a License.",
    "unaffable unbelievably reproduction", "don't stop! (really?) [x] {y} <z>", "tab\tand\nnewline\r\n\r\nend",
    "12345 3.14159 1,000,000", "naïve café résumé NAÏVE CAFÉ", "e\u0301 a\u0308 o\u0302\u0301 n\u0303", "Ｆｕｌｌ　ｗｉｄｔｈ １２３",
    "ﬁne oﬀice ﬃ", "古池や蛙飛びこむ水の音", "漢字とかなとカナ", "한국어 텍스트", "😀 emoji 👩\u200d👩\u200d👧 end", "В чащах юга",
    "Straße GROSSE İstanbul ǅ", "٢٣ كتاب", "\u00a0no-break\u2003em space\u3000ideographic", "zero\u200bwidth\u00adsoft \ufeffbom",
    "\x00\x01control\x7f\ufffd", "a_b-c/d\\e|f~g`h", "x" * 99, "x" * 101, "ab" * 60 + " c", "…—–“quoted”‘single’", "▁literal ▁▁ marks ▁",
    "foo@bar.com https://example.org/a?b=c#d", "trailing space ", " leading space", "ﷺ ㍿ ½ Ⅷ ™ ①", "A\u030a\u0301", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚",
]
# What becomes of characters, a few of NFKC's rules: the longest match from the left counts.
RULES = "\n".join(
    "%s\t%s" % (" ".join("%X" % ord(c) for c in a), " ".join("%X" % ord(c) for c in b)) for a, b in [
        ("\u3000", " "), ("\u00a0", " "), ("\u2003", " "), ("\t", " "), ("\n", " "), ("\r", " "), ("\u200b", ""), ("\u00ad", ""), ("\u2581", " "),
        ("e\u0301", "é"), ("a\u0308", "ä"), ("o\u0302", "ô"), ("o\u0302\u0301", "ố"), ("n\u0303", "ñ"), ("A\u030a", "Å"), ("A\u030a\u0301", "Ǻ"),
        ("ﬁ", "fi"), ("ﬀ", "ff"), ("ﬃ", "ffi"), ("…", "..."), ("™", "TM"), ("½", "1⁄2"), ("Ⅷ", "VIII"),
    ] + [(chr(0xFF01 + i), chr(0x21 + i)) for i in range(94)]) + "\n"


def unigram(name, **options):
    with tempfile.TemporaryDirectory() as d:
        rules = Path(d) / "rules.tsv"
        rules.write_text(RULES)
        if options.get("normalization_rule_name") is None:
            options["normalization_rule_tsv"] = str(rules)
        options.pop("normalization_rule_name", None)
        model = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=model, model_type="unigram", vocab_size=480,
            num_threads=1, minloglevel=2, user_defined_symbols=["<sep>"], pad_id=3, **options)
    proto = pb.ModelProto.FromString(model.getvalue())
    # SentencePiece's types: normal 1, unknown 2, control 3, user-defined 4, unused 5, byte 6, as in GGUF.
    metadata = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": [p.piece for p in proto.pieces],
        "tokenizer.ggml.scores": [p.score for p in proto.pieces],
        "tokenizer.ggml.token_type": [p.type for p in proto.pieces],
        "tokenizer.ggml.precompiled_charsmap": list(proto.normalizer_spec.precompiled_charsmap),
        "tokenizer.ggml.add_space_prefix": proto.normalizer_spec.add_dummy_prefix,
        "tokenizer.ggml.remove_extra_whitespaces": proto.normalizer_spec.remove_extra_whitespaces,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }
    own = spm.SentencePieceProcessor(model_proto=model.getvalue())
    return dict(name=name, metadata=metadata, cases=[dict(text=t, ids=own.encode(t)) for t in TEXTS])


def wordpiece(name, lowercase, strip_accents=None):
    trained = BertWordPieceTokenizer(lowercase=lowercase, strip_accents=strip_accents)
    trained.train_from_iterator(CORPUS, vocab_size=600, min_frequency=1, show_progress=False)
    vocab = [t for t, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    with tempfile.TemporaryDirectory() as d:
        path = Path(d) / "vocab.txt"
        path.write_text("".join(t + "\n" for t in vocab))
        own = BertTokenizer(str(path), do_lower_case=lowercase, strip_accents=strip_accents)
        cases = [dict(text=t, ids=own.convert_tokens_to_ids(own.tokenize(t))) for t in TEXTS]
        fast = lambda text: trained.encode(text, add_special_tokens=False).ids
        print(name, "disagree:", [c["text"] for c in cases if c["ids"] != fast(c["text"])])
        cases = [c for c in cases if c["ids"] == fast(c["text"])]
    special = {"[PAD]": 3, "[UNK]": 3, "[CLS]": 3, "[SEP]": 3, "[MASK]": 3}
    # As GGUF files have them: pieces that begin a word are marked, not those that go on.
    mark = lambda t: t if t in special else t[2:] if t.startswith("##") else "\u2581" + t
    metadata = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": [mark(t) for t in vocab],
        "tokenizer.ggml.token_type": [special.get(t, 1) for t in vocab],
        "tokenizer.ggml.unknown_token_id": vocab.index("[UNK]"),
        "tokenizer.ggml.cls_token_id": vocab.index("[CLS]"),
        "tokenizer.ggml.seperator_token_id": vocab.index("[SEP]"),
        "tokenizer.ggml.normalizer.lowercase": lowercase,
    }
    if strip_accents is not None:
        metadata["tokenizer.ggml.normalizer.strip_accents"] = strip_accents
    return dict(name=name, metadata=metadata, cases=cases)


if __name__ == "__main__":
    made = [
        unigram("unigram"),
        unigram("unigram-bytes", byte_fallback=True, character_coverage=0.98),
        unigram("unigram-spaces", remove_extra_whitespaces=False, add_dummy_prefix=False),
        wordpiece("wordpiece", True),
        wordpiece("wordpiece-cased", False),
        wordpiece("wordpiece-accents", True, strip_accents=False),
    ]
    with open(HERE / "tokenizers.json", "w") as out:
        out.write("[\n" + ",\n".join(json.dumps(m, ensure_ascii=False) for m in made) + "\n]\n")
