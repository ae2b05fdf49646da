"""What the package costs and how good its dictionaries are; run as `python -m benchmarks.x`.

speed           time and memory, against a dense reference: `make bench`
dictionaries    one dictionary on a whole split of the corpus, sweeps, numbers of pairs
quality         planted features, removals in a real model: `make bench-quality`
report_pictures the README's pictures of a report
"""
