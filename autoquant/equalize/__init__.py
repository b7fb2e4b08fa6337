"""A copy of a model that computes the same bits, and whose inputs lose less in 4 bits.

What a product reads can be scaled channel by channel, if what makes it is scaled back. Powers of
two change no digit of BF16, so that the model stays what it was; in a block of 16 inputs with one
scale, a large channel leaves the others fewer steps.
"""
