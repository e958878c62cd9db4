from minillm_jax.tokenizer import Tokenizer


class MissingTokenizer(Tokenizer):
    @classmethod
    def for_model(cls, vocab_size, eos_token_ids):
        t = cls("{}", "{}")
        t.__dict__.update(
            vocab_size=vocab_size, eos_token_ids=tuple(eos_token_ids), _token_bytes={}, control_ids=frozenset()
        )
        if eos_token_ids:
            t.__dict__["eos_token_id"] = eos_token_ids[0]
        return t
