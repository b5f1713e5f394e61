"""Generation: sampling, decoding, answers, and z from judgements."""
