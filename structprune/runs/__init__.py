"""One driver a verb, without a console: the only modules that know all stages."""
