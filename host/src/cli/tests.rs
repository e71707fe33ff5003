//! The command line's grammar.

use super::*;
use clap::CommandFactory;
use clap::error::ErrorKind::{
    ArgumentConflict, MissingRequiredArgument, UnknownArgument, ValueValidation,
};

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(std::iter::once("kigo").chain(line.split_whitespace()))
}

fn refused(line: &str) -> clap::error::ErrorKind {
    match parse(line) {
        Ok(cli) => panic!("{line} was taken as {cli:?}"),
        Err(error) => {
            assert_eq!(error.exit_code(), 2, "{line}");
            error.kind()
        }
    }
}

#[test]
fn the_definition_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn every_command_line_of_the_documentation_is_understood() {
    for line in [
        "run --model smollm2-135m-instruct-q4_1 --system hello",
        "generate --prompt hi --max-tokens 5 --temperature 0 --top-k 1 --top-p 0.5 --min-p 0 \
         --repetition-penalty 1.1 --seed 3 --stop a --stop b --json",
        "generate --messages chat.json",
        "generate --ids 1,2,3 --device cuda:1 --exact",
        "serve --host 0.0.0.0 --port 0 --max-tokens 100",
        "tokenize --parse-special --add-special --json",
        "detokenize --ids 1,2",
        "detokenize",
        "chat-template",
        "logits --ids 1,2,3 --top 5",
        "perplexity --ids-file ids.json",
        "inspect model.gguf --json",
        "tensor model.gguf token_embd.weight --offset 3 --count 4",
        "quantize model.gguf small.gguf --type q4_k --force",
        "models list",
        "models fetch smollm2-135m-instruct-q4_1",
        "bench -p 512 -n 128 -r 5 --depth 8192",
        "bench --synthetic llama-8b-q4_k_m --first-token",
        "bench --depth 4096 --plot step.svg",
        "ptx list",
        "ptx show rms_norm",
        "ptx stats",
        "selftest --device cuda",
        "accuracy tests/golden/tiny --only llama --device cpu",
    ] {
        if let Err(error) = parse(line) {
            panic!("{line}: {error}");
        }
    }
}

#[test]
fn common_flags_may_stand_before_or_after_the_command() {
    for line in [
        "--json --device cpu --threads 2 --ctx-size 9 bench",
        "bench --json --device cpu --threads 2 --ctx-size 9",
    ] {
        let common = parse(line).unwrap().common;
        assert_eq!(common.device, DeviceChoice::Cpu);
        assert_eq!((common.json, common.exact), (true, false));
        assert_eq!((common.threads, common.ctx_size), (Some(2), Some(9)));
    }
}

#[test]
fn wrong_usage_is_refused() {
    assert_eq!(refused("generate"), MissingRequiredArgument);
    assert_eq!(refused("generate --prompt a --ids 1"), ArgumentConflict);
    assert_eq!(refused("generate --ids 1,x"), ValueValidation);
    assert_eq!(refused("generate --ids -1"), UnknownArgument);
    assert_eq!(
        refused("generate --prompt a --max-tokens 0"),
        ValueValidation
    );
    assert_eq!(refused("logits"), MissingRequiredArgument);
    assert_eq!(refused("bench --device gpu"), ValueValidation);
    assert_eq!(refused("bench --threads 0"), ValueValidation);
    assert_eq!(refused("serve --host example"), ValueValidation);
    assert_eq!(refused("models fetch"), MissingRequiredArgument);
}

#[test]
fn ids_are_read_in_every_form() {
    for text in [
        "[1, 2, 3]",
        "{\"ids\": [1,2,3]}",
        "1 2 3\n",
        "1,2,3",
        " 1, 2,\n3",
    ] {
        assert_eq!(text::parse_ids(text).unwrap(), [1, 2, 3], "{text}");
    }
    assert_eq!(text::parse_ids("").unwrap(), [0u32; 0]);
    for text in ["1 x", "[1, -2]", "[1", "{\"id\": 1}", "4294967296"] {
        assert!(text::parse_ids(text).is_err(), "{text}");
    }
}
