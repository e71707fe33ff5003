//! Tokens that are found by their text before anything else looks at it.

use aho_corasick::{AhoCorasick, MatchKind};

use super::Error;
use super::vocab::{TokenType, Vocab};

/// Finds special tokens, the longest first where several begin at the same place.
pub(super) struct Specials {
    /// Control, unknown and user-defined tokens.
    all: Finder,
    /// User-defined tokens only: those are text.
    user_defined: Finder,
}

/// A part of a text.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece<'t> {
    Special(u32),
    /// Never empty.
    Text(&'t str),
}

struct Finder {
    /// None without patterns.
    automaton: Option<AhoCorasick>,
    ids: Vec<u32>,
}

impl Specials {
    pub fn new(vocab: &Vocab<'_>) -> Result<Self, Error> {
        let finder = |wanted: fn(TokenType) -> bool| -> Result<Finder, Error> {
            let (ids, texts): (Vec<u32>, Vec<&str>) = vocab
                .iter()
                // An empty pattern would match everywhere.
                .filter(|&(_, text, ty)| wanted(ty) && !text.is_empty())
                .map(|(id, text, _)| (id, text))
                .unzip();
            if ids.is_empty() {
                return Ok(Finder {
                    automaton: None,
                    ids,
                });
            }
            let automaton = AhoCorasick::builder()
                .match_kind(MatchKind::LeftmostLongest)
                .build(&texts)
                .map_err(|e| vocab.error(format!("special tokens: {e}")))?;
            Ok(Finder {
                automaton: Some(automaton),
                ids,
            })
        };
        Ok(Self {
            all: finder(|ty| {
                matches!(
                    ty,
                    TokenType::Control | TokenType::Unknown | TokenType::UserDefined
                )
            })?,
            user_defined: finder(|ty| ty == TokenType::UserDefined)?,
        })
    }

    /// The text in pieces, in order.
    pub fn split<'t>(&self, text: &'t str, parse_special: bool) -> Vec<Piece<'t>> {
        let finder = if parse_special {
            &self.all
        } else {
            &self.user_defined
        };
        let mut pieces = Vec::new();
        let mut done = 0;
        if let Some(automaton) = &finder.automaton {
            for found in automaton.find_iter(text) {
                if found.start() > done {
                    pieces.push(Piece::Text(&text[done..found.start()]));
                }
                pieces.push(Piece::Special(finder.ids[found.pattern().as_usize()]));
                done = found.end();
            }
        }
        if done < text.len() {
            pieces.push(Piece::Text(&text[done..]));
        }
        pieces
    }
}
