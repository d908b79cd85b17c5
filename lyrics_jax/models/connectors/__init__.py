"""Connectors: what is seen of a picture becomes soft tokens of a language model.

LLaVA's are a linear map or an MLP over the image tokens; BLIP-2's and Lyrics' are Querying Transformers.
"""
