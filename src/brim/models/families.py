"""What a family's name says that its config does not. Tables without torch, held against transformers by a test."""

ENCODERS = frozenset({
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "mobilebert",
    "modernbert", "mpnet", "roberta", "squeezebert", "xlm-roberta", "xlm-roberta-xl",
})  # fmt: skip
"""They read in both directions and fill in masked tokens."""

AFTER_PADDING = frozenset({
    "camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip
"""Positions are counted from the padding's index on, so that as many rows of their table, and one, have no token."""

EAGER_ONLY = frozenset({
    "big_bird", "bigbird_pegasus", "bloom", "codegen", "convbert", "cpmant", "deberta", "deberta-v2", "deepseek_v4",
    "falcon_mamba", "flaubert", "flint", "fnet", "fsmt", "funnel", "gemma2", "git", "got_ocr2", "gpt_neo",
    "gpt_neox_japanese", "gpt_oss", "gptj", "granite_swa", "granitemoe_swa", "hy_v4", "ibert", "inkling2_text", "led",
    "longformer", "longt5", "luke", "mamba", "mamba2", "megatron-bert", "mimo_v2_flash", "mpnet", "mpt", "mra", "mvp",
    "nllb-moe", "nystromformer", "openai-gpt", "pegasus_x", "perceiver", "prophetnet", "reformer", "rembert",
    "roformer", "rwkv", "squeezebert", "switch_transformers", "t5gemma", "tapas", "trocr", "vaultgemma", "xglm", "xlm",
    "xlnet", "xlstm", "yoso",
})  # fmt: skip
"""transformers has their attention written out only, or they have none: `memory.attention = "eager"`."""

FULL_LOSS_ONLY = frozenset({"mobilebert", "perceiver", "prophetnet", "reformer", "xlstm"})
"""More happens between their hidden states and their logits than training/head.py knows: `memory.loss = "full"`."""
