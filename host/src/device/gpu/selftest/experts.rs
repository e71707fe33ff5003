//! Mixtures of experts: routing, products of picked experts, their sum.

use super::Driver;
use super::bench::{Bench, nmse, nmse_at_least};
use crate::error::Result;
use gguf::GgmlType;
use kernels::experts::{self, CombineArgs, ExpertArgs, RouteArgs};

pub fn run<D: Driver>(b: &mut Bench<'_, D>) -> Result<()> {
    for (count, used) in [(4, 2), (8, 8), (40, 3), (128, 8)] {
        for renormalise in [true, false] {
            route(b, count, used, renormalise)?;
        }
    }
    for (ty, cols, rows) in [
        (GgmlType::Q4_K, 256, 24),
        (GgmlType::Q8_0, 96, 70),
        (GgmlType::F16, 20, 9),
    ] {
        linear(b, ty, cols, rows)?;
    }
    for len in [7, 300] {
        combine(b, len)?;
    }
    Ok(())
}

fn route<D: Driver>(
    b: &mut Bench<'_, D>,
    count: usize,
    used: usize,
    renormalise: bool,
) -> Result<()> {
    let rows = 11;
    let mut scores: Vec<f32> = b
        .random
        .values(rows * count)
        .iter()
        .map(|s| s * 4.0)
        .collect();
    // Equal scores: the lower number comes first.
    scores[count - 1] = scores[0];
    scores[1] = scores[0];
    let scores_on = b.upload(&scores)?;
    let (ids_on, weights_on) = (b.alloc(rows * used * 4)?, b.alloc(rows * used * 4)?);
    let args = RouteArgs {
        scores: scores_on.ptr(),
        rows: rows as u32,
        count: count as u32,
        used: used as u32,
        renormalise: u32::from(renormalise),
        ids: ids_on.ptr(),
        weights: weights_on.ptr(),
    };
    let grid = (rows.div_ceil(experts::THREADS as usize / 32) as u32, 1);
    b.driver.launch("route", grid, experts::THREADS, 0, &args)?;
    let ids = b.take::<u32>("route", ids_on)?;
    let weights = b.take::<f32>("route", weights_on)?;
    let (mut wrong, mut expected) = (0, Vec::new());
    for (scores, ids) in scores.chunks(count).zip(ids.chunks(used)) {
        let mut order: Vec<usize> = (0..count).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        wrong += ids
            .iter()
            .zip(&order)
            .filter(|(id, e)| **id as usize != **e)
            .count();
        let exp = |e: &usize| f64::from(scores[*e]).exp();
        let among = if renormalise {
            &order[..used]
        } else {
            &order[..]
        };
        let mass: f64 = among.iter().map(exp).sum();
        expected.extend(order[..used].iter().map(|e| exp(e) / mass));
    }
    let case = format!("{used} of {count}, renormalise {renormalise}");
    b.report("route", format!("{case}, picks"), wrong as f64, 0.0);
    b.report("route", case, nmse(&weights, &expected), 1e-12);
    Ok(())
}

fn linear<D: Driver>(b: &mut Bench<'_, D>, ty: GgmlType, cols: usize, rows: usize) -> Result<()> {
    let (count, slots) = (3, 4);
    let m = b.matrix(ty, count * rows, cols)?;
    let bias = b.random.values(count * rows);
    let ids = [2u32, 0, 2, 1];
    for per_row in [1, 2] {
        let x = b.random.values(slots / per_row * cols);
        let (x_on, bias_on, ids_on) = (b.upload(&x)?, b.upload(&bias)?, b.upload(&ids)?);
        let out = b.alloc(slots * rows * 4)?;
        let args = ExpertArgs {
            matrix: m.matrix,
            bias: bias_on.ptr(),
            ids: ids_on.ptr(),
            x: x_on.ptr(),
            slots_per_row: per_row as u32,
            len: cols as u32,
            rows: rows as u32,
            out: out.ptr(),
        };
        let grid = (
            rows.div_ceil(experts::THREADS as usize / 32) as u32,
            slots as u32,
        );
        b.driver
            .launch("expert_linear", grid, experts::THREADS, 0, &args)?;
        let found = b.take::<f32>("expert_linear", out)?;
        let (mut expected, mut typical) = (Vec::new(), 0.0);
        for (slot, id) in ids.iter().enumerate() {
            let x = &x[slot / per_row * cols..][..cols];
            let own = *id as usize * rows..(*id as usize + 1) * rows;
            let products = &m.times(x)[own.clone()];
            let biased = products.iter().zip(&bias[own]);
            expected.extend(biased.map(|(y, bias)| y + f64::from(*bias)));
            typical += m.typical(x) / count as f64;
        }
        let error = nmse_at_least(&found, &expected, typical);
        let case = format!("{ty}, {rows} × {cols}, {per_row} slots a row");
        b.report("expert_linear", case, error, 1e-10);
    }
    Ok(())
}

fn combine<D: Driver>(b: &mut Bench<'_, D>, len: usize) -> Result<()> {
    let (rows, used) = (3, 4);
    let (x, weights) = (
        b.random.values(rows * used * len),
        b.random.values(rows * used),
    );
    let before = b.random.values(rows * len);
    for add in [false, true] {
        let (x_on, weights_on) = (b.upload(&x)?, b.upload(&weights)?);
        let out = b.upload(&before)?;
        let args = CombineArgs {
            x: x_on.ptr(),
            weights: weights_on.ptr(),
            used: used as u32,
            len: len as u32,
            out: out.ptr(),
            add: u32::from(add),
        };
        let grid = (len.div_ceil(64) as u32, rows as u32);
        b.driver.launch("combine", grid, 64, 0, &args)?;
        let found = b.take::<f32>("combine", out)?;
        let mut expected: Vec<f64> = before
            .iter()
            .map(|v| if add { f64::from(*v) } else { 0.0 })
            .collect();
        for (slot, x) in x.chunks(len).enumerate() {
            let out = &mut expected[slot / used * len..][..len];
            for (out, x) in out.iter_mut().zip(x) {
                *out += f64::from(weights[slot]) * f64::from(*x);
            }
        }
        let case = format!("{used} of {len}, add {add}");
        b.report("combine", case, nmse(&found, &expected), 1e-12);
    }
    Ok(())
}
