"""Data quality: what makes text worse, with the truth kept, and the tools that look for it.

`inject/` has a file per kind of dirt, `filters/` a file per tool; each folder is a registry. A config names them in
`data.inject` and `data.filter`, in the order in which they apply:

    data.inject = ("token_noise share=0.25 rate=0.15", "wheel source=html_bible share=0.3")
    data.filter = ("gopher_quality", "minhash threshold=0.7", "classifier keep=0.5")

Only the training split is ever touched. Follow a document through spec.py (the words above), pool.py (injected text,
read as a stream), chain.py (filters, one after the other), table.py (labels and scores of every document, kept in the
dataset's folder) and truth.py (precision and recall). profiles.py knows the language of each domain.
"""

from moelab.data.quality.prepare import Prepared as Prepared
from moelab.data.quality.prepare import identity as identity
from moelab.data.quality.prepare import prepare as prepare
from moelab.data.quality.spec import parse_filters as parse_filters
from moelab.data.quality.spec import parse_injectors as parse_injectors
from moelab.data.quality.table import Table as Table
from moelab.data.quality.table import read as read
