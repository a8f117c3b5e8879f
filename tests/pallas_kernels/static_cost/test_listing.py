"""What the comments of a bundle listing mean, in the words of both libtpu versions."""

import pytest

from pallas_kernels.static_cost.listing import parse_listing


@pytest.mark.parametrize("comment", ["core id", "megacore core id :: core id"])
def test_the_number_of_the_core_is_recognised(comment):
    listing = parse_listing(f"     0   :  {{ %s1_s21 = sld [smem:[#allocation0]] /* {comment} */ }}\n")
    assert listing.bundles[0][0].words == {"core_id"}
