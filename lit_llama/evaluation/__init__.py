"""Measuring a model: loss on text (`perplexity`), answers to questions (`questions`)."""
