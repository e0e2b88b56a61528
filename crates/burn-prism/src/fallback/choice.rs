//! What a method says of the rows of a selection: masses of their blocks, or the blocks.

use std::ops::Range;

use burn::backend::Backend;
use burn::backend::tensor::Device;
use prism_core::select::ByMass;

use super::tensor::{Bool, Int};

/// What the heads of some sequences on one grid say of their rows.
pub trait RowSource<B: Backend> {
    /// Elements that one row takes on the way.
    fn row_elements(&self) -> usize;

    /// What some rows say. `future` is `[1, 1, rows, blocks]`; `blocks` are those that the last of the
    /// rows may read.
    fn choose(&self, rows: Range<usize>, future: &Bool<B>) -> Choice<B>;
}

/// What rows say of their blocks.
pub enum Choice<B: Backend> {
    /// Integer masses of each band, `[batch, q_heads, rows, blocks]`, and how they choose. What they hold in
    /// the future doesn't count.
    Masses(Vec<Int<B>>, ByMass),
    /// The blocks themselves, which broadcast to `[batch, q_heads, rows, blocks]`. What lies in the
    /// future doesn't count.
    Blocks(Bool<B>),
}

/// Masses of some rows, as [`prism_choose`](crate::ops::PrismBackend::prism_choose) takes them.
pub struct Masses<B: Backend> {
    /// `[batch, q_heads, rows, bands · blocks]`.
    pub masses: Int<B>,
    pub bands: usize,
    pub by: ByMass,
}

/// Mass of a block that a method reads, beyond any nearness that is added to it: of up to 2²⁹ blocks.
const READ: i32 = 1 << 29;

impl<B: Backend> Choice<B> {
    /// What rows after each other say, filled up to `[batch, q_heads, rows, blocks]`.
    pub fn join(parts: Vec<Self>, dims: [usize; 4], device: &Device<B>) -> Self {
        let [batch, heads, _, blocks] = dims;
        let mut bands: Vec<Vec<Int<B>>> = Vec::new();
        let mut how = None;
        for part in parts {
            let (part, rest) = match part {
                Self::Masses(masses, by) => {
                    how = Some(by);
                    (masses, -1)
                }
                Self::Blocks(blocks) => (vec![blocks.int()], 0),
            };
            bands.resize_with(part.len(), Vec::new);
            for (band, part) in bands.iter_mut().zip(part) {
                let wide = [batch, heads, part.dims::<4>()[2], blocks];
                band.push(Int::join(vec![part], 3, wide, rest, device));
            }
        }
        let mut bands = bands.into_iter().map(|band| Int::join(band, 2, dims, 0, device));
        match how {
            Some(by) => Self::Masses(bands.collect(), by),
            None => Self::Blocks(
                Int::join(bands.next().into_iter().collect(), 2, dims, 0, device).is(1),
            ),
        }
    }

    /// As masses `[batch, q_heads, rows, bands · blocks]`, those of blocks −1 in the `future`. The nearest are
    /// the heaviest.
    pub fn masses(self, dims: [usize; 4], future: &Bool<B>) -> Masses<B> {
        let [batch, heads, rows, blocks] = dims;
        match self {
            Self::Masses(masses, by) => {
                let bands = masses.len();
                let dims = [batch, heads, rows, bands * blocks];
                let masses = Int::join(masses, 3, dims, -1, &future.device());
                Masses { masses, bands, by }
            }
            Self::Blocks(read) => {
                let nearness = Int::range(0..blocks, &future.device()).reshape([1, 1, 1, blocks]);
                let masses = read.expand(dims).int() * READ + nearness;
                Masses { masses: masses.fill(future, -1), bands: 1, by: ByMass::Above(READ as u32) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Dispatch;
    use burn::tensor::{Device, Tensor, TensorData};

    type Ints = crate::fallback::tensor::Int<Dispatch>;

    fn ints<const D: usize>(values: Vec<i32>, dims: [usize; D]) -> Ints {
        let data = TensorData::new(values, dims);
        Int(Tensor::<D, burn::tensor::Int>::from_data(data, &Device::flex()).into_dispatch())
    }

    fn values(x: Ints) -> Vec<i32> {
        let x = Tensor::<4, burn::tensor::Int>::from_dispatch(x.0);
        x.into_data().convert::<i32>().try_into_vec().unwrap()
    }

    #[test]
    fn rows_said_apart_are_filled_up_and_joined() {
        let parts = || (ints(vec![5, -1], [1, 2, 1, 1]), ints((0..8).collect(), [1, 2, 2, 2]));
        let device = parts().0.device();
        let (first, rest) = parts();
        let masses =
            [first, rest].map(|x| Choice::Masses(vec![x.clone(), x + 10], ByMass::Above(7)));
        let Choice::Masses(joined, ByMass::Above(7)) =
            Choice::join(masses.into(), [1, 2, 3, 3], &device)
        else {
            panic!("masses became something else")
        };
        let [one, two] = <[Ints; 2]>::try_from(joined).ok().unwrap();
        let right = [5, -1, -1, 0, 1, -1, 2, 3, -1, -1, -1, -1, 4, 5, -1, 6, 7, -1];
        assert_eq!(values(one), right);
        let right = right.map(|x| if x < 0 { -1 } else { x + 10 });
        // What was −1 before 10 was added is no filling.
        assert_eq!(values(two)[..9], right[..9]);

        let (first, rest) = parts();
        let blocks = [first, rest].map(|x| Choice::Blocks(x.below(4)));
        let Choice::Blocks(joined) = Choice::join(blocks.into(), [1, 2, 3, 3], &device) else {
            panic!("blocks became something else")
        };
        let right = [0, 0, 0, 1, 1, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(values(joined.int()), right);
    }
}
