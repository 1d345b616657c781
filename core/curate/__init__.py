"""The data factory: steps over shards of documents, each with its counts, from other people's files to training data.

    sources.py   collect: files, in the layouts of layouts.py             clean.py      Unicode, personal data, language
    filters.py   Gopher's, C4's and Yi's rules                           score.py      numbers from models
    dedup.py     exact, near (MinHash, minhash.py), passages             semantic.py   embeddings, decontamination
    select.py    thresholds, sampling, mixtures (mixture.py)             distil.py     a teacher's answers
    reject.py    judged answers: SFT rows, pairs, rankings               pack.py       token shards for `pretrain`

`runner.py` takes the steps (`step.py`) of a pipeline over the shards, `kept.py` what models said before a kill, and
`report.py` tells what became of the documents. A document is a JSON object:

    id, kind          "text" (has a text) | "problem" (a prompt with what verifies an answer) | "chat" (a prompt)
    text | messages   messages end with the user's turn; answers to it are in
    answers           [{"text", "by", …}]: gold ones, other models', a teacher's
    reference         what `rewards` compares an answer with: a result, or the JSON of tests
    source, licence, language, scores {name: number}, provenance [{"step", …}]
"""
