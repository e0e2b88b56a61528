//! The order in which tiles of the output are worked.
//!
//! Cubes at work at the same time should read the same rows of X and columns of W, which then come from
//! the L2 cache. So tiles are taken column by column within groups of a few rows: what 132 cubes read at
//! a time is a group's rows and a few columns.

use cubecl::prelude::*;

/// Rows of tiles in a group, where a row is of 128: flat from 8 to 32.
const GROUP: u32 = 16;

/// Tiles of an output, and who works them.
#[derive(CubeType, CubeLaunch, Clone, Copy, Debug)]
pub(super) struct Raster {
    /// Rows of tiles; a cluster's tiles, one below the other, count as one.
    pub rows: u32,
    /// Columns of tiles.
    pub columns: u32,
    /// Rows in a group; the last group may have fewer.
    pub group: u32,
    /// Clusters at work: each takes every `clusters`th tile.
    pub clusters: u32,
}

/// Which tile.
#[derive(CubeType, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Tile {
    pub row: u32,
    pub column: u32,
}

#[cube]
impl Raster {
    /// How many tiles there are.
    pub fn tiles(&self) -> u32 {
        self.rows * self.columns
    }

    /// The tile that comes at this place of the order.
    pub fn tile(&self, place: u32) -> Tile {
        let whole = self.group * self.columns;
        let first = place / whole * self.group;
        let within = place % whole;
        let group = self.group.min(self.rows - first);
        Tile { row: first + within % group, column: within / group }
    }
}

impl Raster {
    /// Covers `[m, n]` with tiles of `tile`, worked by clusters of `cluster` cubes, one below the other,
    /// on `multiprocessors`.
    pub(super) fn new(
        [m, n]: [usize; 2],
        tile: [usize; 2],
        cluster: u32,
        multiprocessors: u32,
    ) -> Self {
        let rows = m.div_ceil(tile[0] * cluster as usize) as u32;
        let columns = n.div_ceil(tile[1]) as u32;
        let clusters = (multiprocessors / cluster).clamp(1, (rows * columns).max(1));
        Self { rows, columns, group: (GROUP / cluster).max(1), clusters }
    }

    pub(super) fn arg(&self) -> RasterLaunch {
        RasterLaunch::new(self.rows, self.columns, self.group, self.clusters)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const TILE: [usize; 2] = [128, 256];

    #[test]
    fn every_tile_comes_once_whatever_the_tails() {
        for (m, n) in [(1, 8), (129, 264), (900, 520), (2304, 512), (4096, 6144), (2049, 100_000)] {
            for cluster in [1, 2] {
                let raster = Raster::new([m, n], TILE, cluster, 132);
                let covered = [raster.rows * cluster * 128, raster.columns * 256];
                assert!(covered[0] as usize >= m && covered[1] as usize >= n);
                let tiles: HashSet<_> = (0..raster.tiles()).map(|i| raster.tile(i)).collect();
                assert_eq!(tiles.len(), raster.tiles() as usize, "{m} by {n}");
                assert!(tiles.iter().all(|t| t.row < raster.rows && t.column < raster.columns));
                assert!(raster.clusters >= 1 && raster.clusters <= raster.tiles().min(132));
            }
        }
    }

    #[test]
    fn clusters_at_work_share_rows_and_columns() {
        let raster = Raster::new([131_072, 4096], TILE, 2, 132);
        assert_eq!(raster.clusters, 66);
        for first in (0..raster.tiles() - 66).step_by(66) {
            let at_work: Vec<_> = (first..first + 66).map(|i| raster.tile(i)).collect();
            let rows: HashSet<_> = at_work.iter().map(|tile| tile.row).collect();
            let columns: HashSet<_> = at_work.iter().map(|tile| tile.column).collect();
            assert!(rows.len() <= 16 && columns.len() <= 16, "{} {}", rows.len(), columns.len());
        }
    }

    #[test]
    fn the_last_group_may_be_smaller() {
        let raster = Raster { rows: 5, columns: 2, group: 4, clusters: 1 };
        let order: Vec<_> = (0..10).map(|i| raster.tile(i)).map(|t| (t.row, t.column)).collect();
        let group = [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1), (2, 1), (3, 1)];
        assert_eq!(order, [&group[..], &[(4, 0), (4, 1)]].concat());
    }
}
