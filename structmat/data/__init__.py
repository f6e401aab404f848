"""Real data as pure functions of (seed, step); depends on nothing else of structmat.

`bytes_text` (the embedded default corpus), `own` (a user's folder, jsonl or npy), `batches` (windows of tokens),
`bigram` (the n-gram reference a language model has to beat), `digits` (scikit-learn's images), `images` (those or a folder of
arrays).
"""
