"""The grammar behind the template engine: a small world whose best policy can be computed."""
