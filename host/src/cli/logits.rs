//! `kigo logits` and `kigo perplexity`: what the model computes, before any sampling.

use super::{Common, load, print_json, read_file, stdout_error, text};
use crate::engine::Direct;
use crate::engine::direct::{log_sum_exp, top_logits};
use crate::error::{Error, Result};
use clap::Args;
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(super) struct LogitsArgs {
    /// Token ids, fed as given; the logits are those after the last one
    #[arg(long, value_name = "IDS", value_delimiter = ',', required = true)]
    ids: Vec<u32>,
    /// Only the N greatest, and the log of the sum of all exponentials
    #[arg(long, value_name = "N")]
    top: Option<usize>,
}

#[derive(Debug, Args)]
pub(super) struct PerplexityArgs {
    /// A JSON array of token ids
    #[arg(long, value_name = "FILE")]
    ids_file: PathBuf,
}

/// Shown where neither `--json` nor `--top` says otherwise.
const SHOWN: usize = 10;

pub(super) fn logits(common: &Common, args: &LogitsArgs, out: &mut dyn Write) -> Result<()> {
    let file = load::open_to_run(common)?;
    let mut direct = Direct::new(load::load(common, &file, args.ids.len())?.runner);
    direct.feed(&args.ids)?;
    let logits = direct.logits()?;
    let n_vocab = logits.len();
    let log_sum = log_sum_exp(&logits);
    let top = top_logits(&logits, args.top.unwrap_or(SHOWN));
    match (common.json, args.top) {
        (true, None) => print_json(out, &json!({ "n_vocab": n_vocab, "logits": logits })),
        (true, Some(_)) => {
            let value = json!({ "n_vocab": n_vocab, "logsumexp": log_sum, "top": top });
            print_json(out, &value)
        }
        (false, _) => {
            let mut table = format!("{:>8}  {:>10}  probability\n", "id", "logit");
            for (id, logit) in top {
                let p = (f64::from(logit) - log_sum).exp();
                table.push_str(&format!("{id:>8}  {logit:>10.4}  {p:.6}\n"));
            }
            write!(out, "{table}").map_err(stdout_error)
        }
    }
}

pub(super) fn perplexity(
    common: &Common,
    args: &PerplexityArgs,
    out: &mut dyn Write,
) -> Result<()> {
    let ids = text::parse_ids(&read_file(&args.ids_file)?)?;
    if ids.len() < 2 {
        return Err(Error::Request(format!(
            "{}: {} ids, expected at least 2: each is predicted from those before it",
            args.ids_file.display(),
            ids.len()
        )));
    }
    let file = load::open_to_run(common)?;
    let mut direct = Direct::new(load::load(common, &file, ids.len())?.runner);
    let vocabulary = direct.runner().info().vocabulary;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocabulary) {
        let what = format!("token id {id} is outside the vocabulary of {vocabulary}");
        return Err(Error::Request(what));
    }
    let mut targets = ids[1..].iter();
    let mut nll_sum = 0.0;
    direct.feed_each(&ids[..ids.len() - 1], |logits| {
        if let Some(&id) = targets.next() {
            nll_sum += log_sum_exp(&logits) - f64::from(logits[id as usize]);
        }
    })?;
    let n = ids.len() - 1;
    if common.json {
        return print_json(out, &json!({ "nll_sum": nll_sum, "n": n }));
    }
    let perplexity = (nll_sum / n as f64).exp();
    writeln!(
        out,
        "perplexity {perplexity:.4} over {n} tokens (negative log-likelihood {nll_sum:.4})"
    )
    .map_err(stdout_error)
}
