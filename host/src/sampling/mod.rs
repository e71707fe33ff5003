//! From logits to a token: parameters, random numbers, the choice itself, and stop strings.
//!
//! [`sample`] is the plain reference. A kernel that samples on the device must make the same choice
//! bit for bit, so the definition is exact; nothing in it depends on the order of a reduction or
//! on a platform's `exp`. With `l` the logits of one position, `V` of them:
//!
//! 0. A NaN logit counts as `-inf`, and `-0.0` as `+0.0`.
//! 1. **Repetition penalty** `r` over the set of distinct ids seen (prompt and generated; ids at or
//!    above `V` are ignored): `l > 0` becomes `l / r`, any other `l * r` (Keskar et al. 2019, CTRL).
//! 2. **Temperature** 0 (anything below [`MIN_TEMPERATURE`]): the greatest logit wins, the lowest id
//!    on ties. Nothing below applies.
//! 3. `l` becomes `l / temperature`.
//! 4. **Rank**: tokens are ordered by `l` descending, id ascending. **Top-k** keeps the first `k`; 0
//!    keeps all.
//! 5. **Mass**: `w = round(exp(l - l_max) * 2^40)` as an integer, half to even, see
//!    [`mass`](fn@mass). Integer sums do not depend on their order.
//! 6. **Top-p** (Holtzman et al. 2019) keeps the shortest beginning of the rank order whose mass is
//!    at least `top_p` of the mass kept so far. `top_p` is taken as `round(top_p * 2^24) / 2^24`.
//! 7. **Min-p** (Nguyen et al. 2024) keeps `w >= min_p * 2^40` (`2^40` is the best token's mass);
//!    `min_p` is taken as a multiple of `2^-24` as well. The best token always stays.
//! 8. **Draw**: with `T` the mass that is left and `u` in `[0, 1)` a multiple of `2^-24`, the choice
//!    is the first id, in ascending order of ids, at which the running mass exceeds `floor(u * T)`.
//!
//! `u` comes from [`uniform`], a counter-based generator: the request's seed and the token's index
//! determine it, so nothing is ever reseeded, and neither batching nor scheduling changes a result.

//!
//! [`chain`] has the samplers that go beyond this; they run on the host.

pub mod chain;
mod params;
mod rng;
mod sample;
mod stop;

pub use chain::{Chain, ChainState, Dry, History, Mirostat, Sampler, sample_chain};
pub use params::{SamplingParams, Violation};
pub use rng::{philox4x32, uniform, uniform_pair};
pub use sample::{MASS_BITS, MIN_TEMPERATURE, argmax, fraction, mass, sample};
pub use stop::{Emit, StopMatcher};
