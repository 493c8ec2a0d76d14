def engine_differences(*a):
    raise NotImplementedError
