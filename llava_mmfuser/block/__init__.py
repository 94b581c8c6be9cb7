"""The block itself: torch only, nothing else of this package, every import with one dot. An export copies it as it is.

``mmfuser`` is the paper's block, ``rivals`` the simple fusions it is compared with, ``kinds`` what there is to choose
from, ``attention`` its interchangeable kinds, ``leaves`` the modules that hold the parameters, ``sampling`` the
operation that deformable attention stands on, with one definition and faster implementations.
"""
