//! LoRA adapters from GGUF files (arXiv:2106.09685), added at run time: `y += scale * B (A x)`.

use super::Config;
use crate::error::{Error, Result};
use gguf::{Gguf, Tensor};
use std::cell::RefCell;
use std::collections::HashSet;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

/// An adapter to be loaded, as the user names it: `FILE` or `FILE:SCALE`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraSource {
    pub file: PathBuf,
    /// Multiplies what the adapter adds.
    pub scale: f32,
}

impl FromStr for LoraSource {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (file, scale) = match s.rsplit_once(':') {
            // A name may have a colon in it; what follows is a scale only if it is a number.
            Some((file, scale)) => match scale.parse::<f32>() {
                Ok(scale) if scale.is_finite() => (file, scale),
                Ok(_) => return Err(format!("the scale {scale} is no finite number")),
                Err(_) => (s, 1.0),
            },
            None => (s, 1.0),
        };
        if file.is_empty() {
            return Err("expected FILE or FILE:SCALE".into());
        }
        Ok(LoraSource {
            file: file.into(),
            scale,
        })
    }
}

impl fmt::Display for LoraSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.scale)
    }
}

/// An opened adapter.
pub(super) struct Lora {
    pub file: Arc<Gguf>,
    scale: f32,
    /// `adapter.lora.alpha`; a matrix's scale is this over its rank.
    alpha: f32,
    used: RefCell<HashSet<String>>,
}

/// What an adapter adds to one matrix.
pub(super) struct Pair<'a> {
    pub a: Tensor<'a>,
    pub b: Tensor<'a>,
    pub rank: usize,
    pub scale: f32,
}

impl Lora {
    /// # Errors
    /// A file that is no LoRA adapter, or one for another architecture.
    pub fn open(source: &LoraSource, config: &Config) -> Result<Lora> {
        let file = Arc::new(Gguf::open(&source.file)?);
        let bad = |what: String| Error::Model {
            file: source.file.clone(),
            what,
        };
        let meta = file.metadata();
        let kind = meta.opt_str("general.type")?.unwrap_or("model");
        if kind != "adapter" {
            return Err(bad(format!(
                "general.type is {kind:?}, expected \"adapter\"; it is no LoRA adapter"
            )));
        }
        let kind = meta.str("adapter.type")?;
        if kind != "lora" {
            return Err(bad(format!("adapter.type is {kind:?}, expected \"lora\"")));
        }
        let architecture = meta.str("general.architecture")?;
        if architecture != config.architecture {
            return Err(bad(format!(
                "general.architecture is {architecture:?}, but the model's is {:?}",
                config.architecture
            )));
        }
        let alpha = meta.f32("adapter.lora.alpha")?;
        if !alpha.is_finite() {
            return Err(bad(format!(
                "adapter.lora.alpha is {alpha}, expected a finite number"
            )));
        }
        Ok(Lora {
            scale: source.scale,
            alpha,
            used: RefCell::default(),
            file,
        })
    }

    /// What it adds to the matrix `name`, `rows × cols`, if it does.
    ///
    /// # Errors
    /// One tensor of the two, or sizes that do not fit.
    pub fn pair(&self, name: &str, cols: usize, rows: usize) -> Result<Option<Pair<'_>>> {
        let names = [
            format!("{name}.weight.lora_a"),
            format!("{name}.weight.lora_b"),
        ];
        if names.iter().all(|name| self.file.tensor(name).is_none()) {
            return Ok(None);
        }
        let (a, b) = (self.file.require(&names[0])?, self.file.require(&names[1])?);
        let rank = a.rows() as usize;
        for (tensor, expected) in [(a, [cols, rank]), (b, [rank, rows])] {
            if !tensor.dims().iter().copied().eq(expected.map(|d| d as u64)) {
                return Err(Error::Model {
                    file: self.file.path().to_owned(),
                    what: format!(
                        "tensor {} has dimensions {:?}, expected {expected:?} for the model's {name}",
                        tensor.name(),
                        tensor.dims()
                    ),
                });
            }
        }
        self.used.borrow_mut().extend(names);
        // Without an alpha a file was trained with none.
        let scale = match self.alpha {
            0.0 => self.scale,
            alpha => self.scale * alpha / rank as f32,
        };
        Ok(Some(Pair { a, b, rank, scale }))
    }

    /// # Errors
    /// A tensor that belongs to no matrix of the model that adapters can be added to.
    pub fn check_all_used(&self) -> Result<()> {
        let used = self.used.borrow();
        let mut names = self.file.tensors().map(|t| t.name());
        match names.find(|name| !used.contains(*name)) {
            None => Ok(()),
            Some(name) => Err(Error::Model {
                file: self.file.path().to_owned(),
                what: format!(
                    "tensor {name} belongs to no matrix of the model that an adapter can be added \
                     to: those of attention, of feed-forward parts without experts, and output"
                ),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_is_what_follows_the_last_colon() {
        let parse = |s: &str| s.parse::<LoraSource>().map(|l| (l.file, l.scale));
        assert_eq!(parse("a.gguf"), Ok(("a.gguf".into(), 1.0)));
        assert_eq!(parse("a.gguf:-0.5"), Ok(("a.gguf".into(), -0.5)));
        assert_eq!(parse("c:a.gguf"), Ok(("c:a.gguf".into(), 1.0)));
        assert!(parse("a:inf").is_err());
        assert!(parse(":1").is_err());
    }
}
