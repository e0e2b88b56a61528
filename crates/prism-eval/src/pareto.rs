//! What costs least for what it keeps.

/// Whether each point of (cost, loss) is on the Pareto front: no other costs no more and loses no more, one
/// of them less. Points that aren't finite never are.
pub fn front(points: &[(f64, f64)]) -> Vec<bool> {
    let finite = |&(cost, loss): &(f64, f64)| cost.is_finite() && loss.is_finite();
    let better = |a: &(f64, f64), b: &(f64, f64)| a.0 <= b.0 && a.1 <= b.1 && a != b;
    let beaten = |b| points.iter().filter(|a| finite(a)).any(|a| better(a, b));
    points.iter().map(|point| finite(point) && !beaten(point)).collect()
}

/// The loss of a curve of (cost, loss) at a cost, linear between its points; `None` outside them.
pub fn at(curve: &[(f64, f64)], cost: f64) -> Option<f64> {
    let mut curve = curve.to_vec();
    curve.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (a, b) = curve
        .windows(2)
        .map(|pair| (pair[0], pair[1]))
        .find(|(a, b)| a.0 <= cost && cost <= b.0 && a.0 < b.0)?;
    Some(a.1 + (b.1 - a.1) * (cost - a.0) / (b.0 - a.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_a_point_that_another_beats_not_on_the_front() {
        let points = [(0.1, 0.5), (0.2, 0.3), (0.2, 0.4), (0.3, 0.3), (0.4, 0.1), (f64::NAN, 0.0)];
        assert_eq!(front(&points), [true, true, false, false, true, false]);
        assert_eq!(front(&[(0.2, 0.3), (0.2, 0.3)]), [true, true]);
    }

    #[test]
    fn is_a_curve_read_between_its_points_only() {
        let curve = [(0.4, 0.1), (0.2, 0.3)];
        assert!((at(&curve, 0.3).unwrap() - 0.2).abs() < 1e-12);
        assert_eq!(at(&curve, 0.5), None);
        assert_eq!(at(&curve[..1], 0.4), None);
    }
}
