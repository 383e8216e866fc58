"""A package of its own: where site-packages holds another `tests`, ours, which comes first, has to be one as well."""
