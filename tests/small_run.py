"""A run that takes a second: its config, and two small domains of text of our own."""

CONFIG = dict(
    seed=3,
    model=dict(num_layers=1, width=32, num_heads=2, num_kv_heads=1, head_dim=16, dense_width=64),
    moe=dict(num_experts=4, expert_width=32),
    train=dict(num_steps=3, batch_size=2, length=16),
    schedule=dict(warmup_steps=1),
    tokenizer=dict(kind="byte"),
    balance=dict(loss_free_bias=dict(rate=0.01)),
    evaluation=dict(every=2, tokens_per_domain=64, precisions=("float32", "nvfp4_wa")),
    checkpoint=dict(every=2),
)


def write_text(root):
    """Writes the domains below a folder and returns it."""
    for domain, words in (("north", "snow and ice "), ("south", "sun and sand ")):
        (root / domain).mkdir()
        for i in range(60):
            (root / domain / f"{i}.txt").write_text(f"{i} " + words * (3 + i % 5))
    return root


def config_with(folder, **sections):
    """CONFIG on that text, with fields of sections changed."""
    config = CONFIG | {"data": dict(kind="text", path=str(folder))}
    for name, fields in sections.items():
        config[name] = (dict(config[name]) if name in config and fields else {}) | fields
    return config
