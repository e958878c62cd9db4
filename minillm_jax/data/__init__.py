"""JSONL files to typed records, to tokens, to packed rows, to batches of numpy arrays; nothing here imports jax."""

from minillm_jax.data.encode import tokenize_file as tokenize_file
from minillm_jax.data.errors import DataError as DataError
from minillm_jax.data.errors import SkipReport as SkipReport
from minillm_jax.data.loader import Rows as Rows
from minillm_jax.data.loader import TokenRows as TokenRows
from minillm_jax.data.loader import eval_batches as eval_batches
from minillm_jax.data.loader import load_rows as load_rows
from minillm_jax.data.loader import make_iterator as make_iterator
from minillm_jax.data.packing import Batch as Batch
from minillm_jax.data.preference import PairRows as PairRows
from minillm_jax.data.preference import load_pairs as load_pairs
from minillm_jax.data.prompts import PromptRows as PromptRows
from minillm_jax.data.prompts import load_prompts as load_prompts
from minillm_jax.data.records import read_records as read_records
