"""`moesaic demo`: the whole way from a dense LLaMA to a trained mixture of experts, on one page.

`run` does the work and collects plain results, `page` turns them into the report.
"""
