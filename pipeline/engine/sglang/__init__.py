"""SGLang as an engine of the pipeline: the only package that imports sglang.

`engine` is the adapter, `plugin` what SGLang loads in each of its processes, `compat` the list of upstream
symbols that all of this leans on. Importing the package itself imports neither SGLang nor torch.
"""
