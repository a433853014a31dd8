"""Text in, batches of token windows out.

>>> from moelab import data, schema
>>> dataset = data.build(schema.Corpus(), schema.Bpe())                         # doctest: +SKIP
>>> batches = data.train_batches(dataset, batch_size=16, length=256, seed=0)    # doctest: +SKIP
>>> batches[0].token_BL.shape                                                   # doctest: +SKIP
(16, 256)

Follow a document through split.py, tokenizer.py, build.py, dataset.py and loader.py; where it comes
from is corpus.py, stdlib_corpus.py, sources.py or token_files.py. Importing this imports no jax.
"""

from moelab.data import kneser_ney as kneser_ney
from moelab.data.build import build as build
from moelab.data.build import cache_directory as cache_directory
from moelab.data.dataset import Dataset as Dataset
from moelab.data.dataset import TokenSplit as TokenSplit
from moelab.data.dataset import load as load
from moelab.data.dataset import verify as verify
from moelab.data.describe import Sample as Sample
from moelab.data.describe import describe as describe
from moelab.data.describe import sample as sample
from moelab.data.document import DataError as DataError
from moelab.data.judge import score as score
from moelab.data.judge import write_scores as write_scores
from moelab.data.judge import write_text as write_text
from moelab.data.loader import Batch as Batch
from moelab.data.loader import EvaluationBatches as EvaluationBatches
from moelab.data.loader import evaluation_batches as evaluation_batches
from moelab.data.loader import train_batches as train_batches
from moelab.data.split import SPLITS as SPLITS
