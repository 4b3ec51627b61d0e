# DN-B. eps and momentum stay those of the norm that it replaces.
norm_cfg = dict(type='DNB')
