//! Runs a template within its limits.
//!
//! minijinja bounds instructions and recursion, but one instruction can double a string or print a
//! list that contains itself forty times over. So the compiled program is rewritten: the operators
//! that make values become calls of metered filters, results are weighed, and all text goes through
//! one metered formatter. A filter's name that no template can spell marks each of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use minijinja::machinery::{
    CodeGenerator, Instruction, Instructions, Token, Vm, WhitespaceConfig, make_string_output,
    parse, tokenize,
};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{AutoEscape, Environment, ErrorKind};

use super::super::Error;
use super::builtins::{self, ADD, CONCAT, MULTIPLY, WEIGH};
use super::limits::{self, Meter};

/// Enough for the deepest expression and recursion that the limits let through, in any build: two
/// bytes of a tag can be one level. Memory is taken only as far as it is used.
const STACK: usize = 128 << 20;

/// transformers' `trim_blocks` and `lstrip_blocks`; one newline at the end is dropped, as in Jinja2.
const WHITESPACE: WhitespaceConfig = WhitespaceConfig {
    keep_trailing_newline: false,
    lstrip_blocks: true,
    trim_blocks: true,
};

/// The template's text with these variables.
pub(super) fn render(source: &str, context: Value) -> Result<String, Error> {
    if source.len() > limits::SOURCE {
        return Err(Error::Template(format!(
            "it has {} bytes; templates up to {} bytes are run",
            source.len(),
            limits::SOURCE
        )));
    }
    let source = without_generation_tags(source);
    // On a stack of known size, for callers on small ones; a panic in the engine stays there, too.
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("chat-template".into())
            .stack_size(STACK)
            .spawn_scoped(scope, || run(&source, context))
            .map_err(|e| Error::Template(format!("no thread to run it on: {e}")))?
            .join()
            .unwrap_or_else(|_| Err(Error::Template("the template engine failed".into())))
    })
}

fn run(source: &str, context: Value) -> Result<String, Error> {
    let meter = Arc::new(Meter::start());
    check_tags(source).map_err(|e| explain(e, &meter))?;
    let env = builtins::environment(&meter);
    evaluate(source, context, &env).map_err(|e| explain(e, &meter))
}

fn evaluate(
    source: &str,
    context: Value,
    env: &Environment<'_>,
) -> Result<String, minijinja::Error> {
    let tree = parse(source, NAME, SyntaxConfig, WHITESPACE)?;
    let mut generator = CodeGenerator::new(NAME, source);
    generator.compile_stmt(&tree);
    let (program, blocks) = generator.finish();
    let program = metered(&program, source);
    let blocks: BTreeMap<&str, Instructions<'_>> = blocks
        .iter()
        .map(|(name, block)| (*name, metered(block, source)))
        .collect();
    let mut text = String::new();
    Vm::new(env).eval(
        &program,
        context,
        &blocks,
        &mut make_string_output(&mut text),
        AutoEscape::None,
    )?;
    Ok(text)
}

const NAME: &str = "chat_template";

fn explain(error: minijinja::Error, meter: &Meter) -> Error {
    if let Some(message) = meter.raised() {
        return Error::TemplateRefused(message);
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return Error::Template(format!("it takes more than {} steps", limits::FUEL));
    }
    let mut message = String::new();
    if let Some(line) = error.line() {
        message = format!("line {line}: ");
    }
    match (error.kind(), error.detail()) {
        // Most of these are the meter's; the message says all.
        (ErrorKind::InvalidOperation, Some(detail)) => message += detail,
        (kind, Some(detail)) => message += &format!("{kind}: {detail}"),
        (kind, None) => message += &kind.to_string(),
    }
    Error::Template(message)
}

/// Checks what would run before the program does: the parser's recursion, and constants, which
/// are computed while compiling.
fn check_tags(source: &str) -> Result<(), minijinja::Error> {
    let mut start = 0;
    let (mut repeatable, mut product, mut times) = (false, 1u64, false);
    for token in tokenize(source, false, SyntaxConfig, WHITESPACE) {
        let (token, span) = token?;
        match token {
            Token::VariableStart | Token::BlockStart => {
                start = span.start_offset;
                (repeatable, product, times) = (false, 1, false);
            }
            Token::Str(_) | Token::String(_) | Token::BracketOpen | Token::ParenOpen => {
                repeatable = true;
            }
            Token::Int(n) => product = product.saturating_mul(n.max(1)),
            Token::Int128(_) => product = u64::MAX,
            Token::Mul => times = true,
            Token::Pow => (times, product) = (true, u64::MAX),
            _ => {}
        }
        if (span.end_offset.saturating_sub(start)) as usize > limits::TAG
            && !matches!(token, Token::TemplateData(_))
        {
            return Err(limits::refuse(format!(
                "line {}: a tag has more than {} bytes",
                span.start_line,
                limits::TAG
            )));
        }
        if repeatable && times && product > limits::REPEAT {
            return Err(limits::refuse(format!(
                "line {}: a text or list may be repeated {product} times, more than {}",
                span.start_line,
                limits::REPEAT
            )));
        }
    }
    Ok(())
}

/// The program with every operation that can make much out of little behind the meter.
fn metered<'s>(program: &Instructions<'s>, source: &'s str) -> Instructions<'s> {
    // `!0`: no slot in the cache of looked-up filters.
    let filter = |name, args| Instruction::ApplyFilter(name, Some(args), !0);
    let mut parts: Vec<Vec<Instruction<'s>>> = Vec::with_capacity(program.len());
    for i in 0..program.len() as u32 {
        let Some(instruction) = program.get(i).cloned() else {
            break;
        };
        parts.push(match instruction {
            Instruction::EmitRaw(text) => {
                vec![Instruction::LoadConst(Value::from(text)), Instruction::Emit]
            }
            Instruction::Add => vec![filter(ADD, 2)],
            Instruction::Mul => vec![filter(MULTIPLY, 2)],
            Instruction::StringConcat => vec![filter(CONCAT, 2)],
            // A namespace that holds itself would never end.
            Instruction::SetAttr(_) => vec![
                Instruction::Swap,
                filter(WEIGH, 1),
                Instruction::Swap,
                instruction,
            ],
            Instruction::BuildList(_)
            | Instruction::BuildMap(_)
            | Instruction::ApplyFilter(..)
            | Instruction::PerformTest(..)
            | Instruction::CallFunction(..)
            | Instruction::CallMethod(..)
            | Instruction::CallObject(_)
            | Instruction::Eq
            | Instruction::Ne
            | Instruction::Gt
            | Instruction::Gte
            | Instruction::Lt
            | Instruction::Lte
            | Instruction::In => vec![instruction, filter(WEIGH, 1)],
            _ => vec![instruction],
        });
    }
    let mut moved: Vec<u32> = Vec::with_capacity(parts.len() + 1);
    let mut at = 0;
    for part in &parts {
        moved.push(at);
        at += part.len() as u32;
    }
    moved.push(at);

    let mut out = Instructions::new(NAME, source);
    for (i, part) in parts.into_iter().enumerate() {
        for mut instruction in part {
            if let Instruction::Iterate(target)
            | Instruction::Jump(target)
            | Instruction::JumpIfFalse(target)
            | Instruction::JumpIfFalseOrPop(target)
            | Instruction::JumpIfTrueOrPop(target)
            | Instruction::BuildMacro(_, target, _) = &mut instruction
            {
                *target = moved.get(*target as usize).copied().unwrap_or(at);
            }
            match program.get_line(i as u32) {
                Some(line) => out.add_with_line(instruction, line as u16),
                None => out.add(instruction),
            };
        }
    }
    out
}

/// `{% generation %}` marks the assistant's words for training; here it means nothing.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let inner = &rest[open + 2..];
        let Some(close) = inner.find("%}") else {
            break;
        };
        let tag = &inner[..close];
        let name = tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match name {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        out.push_str(&rest[..open + 2]);
        match replacement {
            // Keeps the tag's marks for whitespace.
            Some(new) => out.push_str(&tag.replacen(name, &format!(" {new} "), 1)),
            None => out.push_str(tag),
        }
        out.push_str("%}");
        rest = &inner[close + 2..];
    }
    out.push_str(rest);
    out
}
