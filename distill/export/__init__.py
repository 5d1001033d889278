"""Students in formats that other programs run: transformers' own classes and llama.cpp's files.

One student, several namings: ``weights`` says how names and shapes correspond, ``refusals`` what a format cannot say,
``formats`` which formats there are, and ``exporting`` writes one, whole or not at all.
"""
