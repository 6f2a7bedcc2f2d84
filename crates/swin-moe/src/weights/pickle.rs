//! A restricted unpickler: enough for state dictionaries, and nothing that runs code.
//!
//! Pickle is a program for a stack machine. This one knows containers, numbers, strings and the
//! few constructors that tensors are made by; any other object becomes [`Object::Opaque`], so
//! that a training checkpoint with optimizer states and settings is readable, too. Every operand
//! comes from the file and is checked.

use std::collections::HashMap;

use super::tensors::Element;

/// Index of an object in the [`Machine`]'s arena. Pickle mutates containers after they have been
/// put into others, so that objects are referred to, not owned.
pub(super) type Ref = usize;

/// An unpickled object.
#[derive(Debug, Clone)]
pub(super) enum Object {
    /// Anything that a state dictionary does not need.
    Opaque,
    Int(i64),
    Str(String),
    Tuple(Vec<Ref>),
    List(Vec<Ref>),
    Dict(Vec<(Ref, Ref)>),
    /// `module name`.
    Global(String),
    /// A tensor's memory, in a file of its own.
    Storage(Storage),
    Tensor(StridedTensor),
}

/// Where a tensor's elements are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Storage {
    pub(super) element: Element,
    pub(super) key: String,
}

/// A view of a storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StridedTensor {
    pub(super) storage: Storage,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

/// The result: the root object and everything it refers to.
#[derive(Debug)]
pub(super) struct Unpickled {
    pub(super) root: Ref,
    objects: Vec<Object>,
}

impl Unpickled {
    pub(super) fn get(&self, object: Ref) -> &Object {
        self.objects.get(object).unwrap_or(&Object::Opaque)
    }

    /// The entry of a dictionary with this key, if there is one.
    pub(super) fn entry(&self, dict: Ref, key: &str) -> Option<Ref> {
        match self.get(dict) {
            Object::Dict(entries) => entries
                .iter()
                .rev()
                .find(|(k, _)| matches!(self.get(*k), Object::Str(s) if s == key))
                .map(|&(_, value)| value),
            _ => None,
        }
    }
}

type Result<T> = core::result::Result<T, String>;

/// Runs a pickle.
pub(super) fn unpickle(bytes: &[u8]) -> Result<Unpickled> {
    let mut machine = Machine {
        input: bytes,
        objects: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    let root = machine.run()?;
    Ok(Unpickled {
        root,
        objects: machine.objects,
    })
}

struct Machine<'a> {
    input: &'a [u8],
    objects: Vec<Object>,
    stack: Vec<Ref>,
    marks: Vec<usize>,
    memo: HashMap<usize, Ref>,
}

impl Machine<'_> {
    fn run(&mut self) -> Result<Ref> {
        loop {
            let opcode = self.byte()?;
            match opcode {
                b'.' => return self.pop(),
                _ => self.step(opcode)?,
            }
        }
    }

    fn step(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            // PROTO, FRAME
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            // NONE, NEWTRUE, NEWFALSE, BINFLOAT
            b'N' | 0x88 | 0x89 => self.push(Object::Opaque),
            b'G' => {
                self.take(8)?;
                self.push(Object::Opaque);
            }
            // BININT1, BININT2, BININT, LONG1
            b'K' => {
                let value = self.unsigned(1)?;
                self.push(Object::Int(value as i64));
            }
            b'M' => {
                let value = self.unsigned(2)?;
                self.push(Object::Int(value as i64));
            }
            b'J' => {
                let value = self.unsigned(4)? as u32 as i32;
                self.push(Object::Int(value.into()));
            }
            0x8a => self.long()?,
            // BINUNICODE, SHORT_BINUNICODE, BINUNICODE8, BINSTRING, SHORT_BINSTRING
            b'X' | b'T' => self.string(4)?,
            0x8c | b'U' => self.string(1)?,
            0x8d => self.string(8)?,
            // SHORT_BINBYTES, BINBYTES, BINBYTES8, BYTEARRAY8
            b'C' => self.skip_bytes(1)?,
            b'B' => self.skip_bytes(4)?,
            0x8e | 0x96 => self.skip_bytes(8)?,
            // EMPTY_DICT, EMPTY_LIST, EMPTY_TUPLE, EMPTY_SET, FROZENSET
            b'}' => self.push(Object::Dict(Vec::new())),
            b']' => self.push(Object::List(Vec::new())),
            b')' => self.push(Object::Tuple(Vec::new())),
            0x8f => self.push(Object::Opaque),
            0x91 => {
                self.pop_to_mark()?;
                self.push(Object::Opaque);
            }
            // MARK, POP, POP_MARK, DUP
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_to_mark()?),
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            // TUPLE, TUPLE1, TUPLE2, TUPLE3
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Object::Tuple(items));
            }
            0x85..=0x87 => {
                let items = self.pop_many(usize::from(opcode - 0x84))?;
                self.push(Object::Tuple(items));
            }
            // BINPUT, LONG_BINPUT, MEMOIZE, BINGET, LONG_BINGET
            b'q' => self.put(1)?,
            b'r' => self.put(4)?,
            0x94 => {
                let top = self.top()?;
                self.memo.insert(self.memo.len(), top);
            }
            b'h' => self.fetch(1)?,
            b'j' => self.fetch(4)?,
            // APPEND, APPENDS, ADDITEMS, SETITEM, SETITEMS
            b'a' => {
                let items = self.pop_many(1)?;
                self.append(items)?;
            }
            b'e' | 0x90 => {
                let items = self.pop_to_mark()?;
                self.append(items)?;
            }
            b's' => {
                let items = self.pop_many(2)?;
                self.set_items(&items)?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(&items)?;
            }
            // GLOBAL, STACK_GLOBAL
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Object::Global(format!("{module} {name}")));
            }
            0x93 => self.stack_global()?,
            // REDUCE, NEWOBJ, NEWOBJ_EX, BUILD, BINPERSID
            b'R' | 0x81 => {
                let parts = self.pop_many(2)?;
                let object = self.construct(parts[0], parts[1])?;
                self.push(object);
            }
            0x92 => {
                self.pop_many(3)?;
                self.push(Object::Opaque);
            }
            b'b' => drop(self.pop()?),
            b'Q' => self.persistent()?,
            other => return Err(format!("pickle opcode {other:#04x} is not supported")),
        }
        Ok(())
    }

    fn take(&mut self, len: usize) -> Result<&[u8]> {
        let (head, rest) = self
            .input
            .split_at_checked(len)
            .ok_or("the pickle ends too early")?;
        self.input = rest;
        Ok(head)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    /// Little-endian, of at most 8 bytes.
    fn unsigned(&mut self, len: usize) -> Result<u64> {
        let bytes = self.take(len)?;
        Ok(bytes
            .iter()
            .rev()
            .fold(0, |sum, &b| (sum << 8) | u64::from(b)))
    }

    fn length(&mut self, width: usize) -> Result<usize> {
        usize::try_from(self.unsigned(width)?).map_err(|e| e.to_string())
    }

    fn line(&mut self) -> Result<String> {
        let end = self
            .input
            .iter()
            .position(|&b| b == b'\n')
            .ok_or("the pickle ends too early")?;
        let line = String::from_utf8_lossy(self.take(end)?).into_owned();
        self.take(1)?;
        Ok(line)
    }

    fn string(&mut self, width: usize) -> Result<()> {
        let len = self.length(width)?;
        let text = String::from_utf8_lossy(self.take(len)?).into_owned();
        self.push(Object::Str(text));
        Ok(())
    }

    fn skip_bytes(&mut self, width: usize) -> Result<()> {
        let len = self.length(width)?;
        self.take(len)?;
        self.push(Object::Opaque);
        Ok(())
    }

    /// A two's complement number; those that do not fit are of no use here.
    fn long(&mut self) -> Result<()> {
        let len = self.length(1)?;
        let bytes = self.take(len)?;
        let object = match (bytes.last(), len) {
            (None, _) => Object::Int(0),
            (Some(&top), ..=8) => {
                let fill = if top & 0x80 == 0 { 0 } else { -1 };
                let value = bytes
                    .iter()
                    .rev()
                    .fold(fill, |sum, &b| (sum << 8) | i64::from(b));
                Object::Int(value)
            }
            _ => Object::Opaque,
        };
        self.push(object);
        Ok(())
    }

    fn push(&mut self, object: Object) {
        self.stack.push(self.objects.len());
        self.objects.push(object);
    }

    fn top(&self) -> Result<Ref> {
        Ok(*self.stack.last().ok_or("the pickle's stack is empty")?)
    }

    fn pop(&mut self) -> Result<Ref> {
        Ok(self.stack.pop().ok_or("the pickle's stack is empty")?)
    }

    fn pop_many(&mut self, len: usize) -> Result<Vec<Ref>> {
        let at = self
            .stack
            .len()
            .checked_sub(len)
            .ok_or("the pickle's stack is empty")?;
        Ok(self.stack.split_off(at))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Ref>> {
        let mark = self.marks.pop().ok_or("the pickle lacks a mark")?;
        if mark > self.stack.len() {
            return Err("the pickle's mark is above its stack".into());
        }
        Ok(self.stack.split_off(mark))
    }

    fn put(&mut self, width: usize) -> Result<()> {
        let (slot, top) = (self.length(width)?, self.top()?);
        self.memo.insert(slot, top);
        Ok(())
    }

    fn fetch(&mut self, width: usize) -> Result<()> {
        let slot = self.length(width)?;
        let object = *self
            .memo
            .get(&slot)
            .ok_or_else(|| format!("the pickle refers to nothing (memo {slot})"))?;
        self.stack.push(object);
        Ok(())
    }

    /// To a list; other objects may be extended in ways that do not matter.
    fn append(&mut self, items: Vec<Ref>) -> Result<()> {
        let list = self.top()?;
        if let Some(Object::List(list)) = self.objects.get_mut(list) {
            list.extend(items);
        }
        Ok(())
    }

    fn set_items(&mut self, items: &[Ref]) -> Result<()> {
        let dict = self.top()?;
        if let Some(Object::Dict(dict)) = self.objects.get_mut(dict) {
            dict.extend(items.as_chunks::<2>().0.iter().map(|&[k, v]| (k, v)));
        }
        Ok(())
    }

    fn stack_global(&mut self) -> Result<()> {
        let parts = self.pop_many(2)?;
        let text = |i: usize| match self.objects.get(parts[i]) {
            Some(Object::Str(text)) => Ok(text.clone()),
            _ => Err("the pickle names a class by something else than strings".to_string()),
        };
        let name = format!("{} {}", text(0)?, text(1)?);
        self.push(Object::Global(name));
        Ok(())
    }

    fn object(&self, object: Ref) -> &Object {
        self.objects.get(object).unwrap_or(&Object::Opaque)
    }

    /// Calls a constructor.
    fn construct(&self, callee: Ref, args: Ref) -> Result<Object> {
        let (Object::Global(name), Object::Tuple(args)) = (self.object(callee), self.object(args))
        else {
            return Ok(Object::Opaque);
        };
        match (name.as_str(), args.as_slice()) {
            ("collections OrderedDict", []) => Ok(Object::Dict(Vec::new())),
            ("torch._utils _rebuild_tensor_v2", [storage, offset, shape, strides, ..]) => {
                self.tensor([*storage, *offset, *shape, *strides])
            }
            ("torch._utils _rebuild_parameter", [tensor, ..]) => Ok(self.object(*tensor).clone()),
            _ => Ok(Object::Opaque),
        }
    }

    fn tensor(&self, [storage, offset, shape, strides]: [Ref; 4]) -> Result<Object> {
        // A storage of an element type that we do not know makes a tensor that we do not know.
        let Object::Storage(storage) = self.object(storage) else {
            return Ok(Object::Opaque);
        };
        let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
        if shape.len() != strides.len() {
            return Err("a tensor has another number of strides than of dimensions".into());
        }
        Ok(Object::Tensor(StridedTensor {
            storage: storage.clone(),
            offset: self.size(offset)?,
            shape,
            strides,
        }))
    }

    fn size(&self, object: Ref) -> Result<usize> {
        match self.object(object) {
            Object::Int(value) => {
                usize::try_from(*value).map_err(|_| "a tensor has a negative size".into())
            }
            _ => Err("a tensor's size is not a number".into()),
        }
    }

    fn sizes(&self, object: Ref) -> Result<Vec<usize>> {
        match self.object(object) {
            Object::Tuple(items) | Object::List(items) => {
                items.iter().map(|&item| self.size(item)).collect()
            }
            _ => Err("a tensor's shape is not a tuple".into()),
        }
    }

    /// `('storage', class, key, device, elements)`
    fn persistent(&mut self) -> Result<()> {
        let id = self.pop()?;
        let Object::Tuple(parts) = self.object(id) else {
            return Err("a persistent object is not a tuple".into());
        };
        let object = match parts.as_slice() {
            [_, class, key, ..] => match (self.object(*class), self.object(*key)) {
                (Object::Global(class), Object::Str(key)) => match element_of(class) {
                    Some(element) => Object::Storage(Storage {
                        element,
                        key: key.clone(),
                    }),
                    None => Object::Opaque,
                },
                _ => return Err("a storage lacks its class or key".into()),
            },
            _ => return Err("a storage lacks its class or key".into()),
        };
        self.push(object);
        Ok(())
    }
}

fn element_of(class: &str) -> Option<Element> {
    Some(match class {
        "torch DoubleStorage" => Element::F64,
        "torch FloatStorage" => Element::F32,
        "torch HalfStorage" => Element::F16,
        "torch BFloat16Storage" => Element::Bf16,
        "torch LongStorage" => Element::I64,
        "torch IntStorage" => Element::I32,
        "torch ShortStorage" => Element::I16,
        "torch CharStorage" => Element::I8,
        "torch ByteStorage" => Element::U8,
        "torch BoolStorage" => Element::Bool,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_every_width() {
        let pickles: [(&[u8], i64); 6] = [
            (b"\x80\x02K\xff.", 255),
            (b"\x80\x02M\xff\x01.", 511),
            (b"\x80\x02J\xfe\xff\xff\xff.", -2),
            (b"\x80\x02\x8a\x00.", 0),
            (b"\x80\x02\x8a\x05\x00\x00\x00\x00\x01.", 1 << 32),
            (b"\x80\x02\x8a\x02\xfe\xff.", -2),
        ];
        for (pickle, expected) in pickles {
            let result = unpickle(pickle).unwrap();
            assert!(
                matches!(result.get(result.root), Object::Int(v) if *v == expected),
                "{pickle:?}"
            );
        }
    }

    #[test]
    fn containers_are_shared_and_filled_later() {
        // a = {}; b = {"x": a}; a["y"] = 7, in memo slot 0; the last entry of a key wins.
        let pickle = b"\x80\x02}X\x01\0\0\0x}q\0s0h\0X\x01\0\0\0yK\x05sX\x01\0\0\0yK\x07s.";
        let result = unpickle(pickle).unwrap();
        let y = result.entry(result.root, "y").unwrap();
        assert!(matches!(result.get(y), Object::Int(7)));
        assert_eq!(result.entry(result.root, "x"), None);
    }

    #[test]
    fn unknown_classes_are_opaque_and_unknown_opcodes_refused() {
        let result = unpickle(b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R.").unwrap();
        assert!(matches!(result.get(result.root), Object::Opaque));
        assert!(unpickle(b"\x80\x02\xff.").unwrap_err().contains("0xff"));
    }

    #[test]
    fn every_damaged_pickle_is_an_error_or_another_pickle() {
        let whole: &[u8] = b"\x80\x02}q\0X\x05\0\0\0modelq\x01}q\x02(X\x01\0\0\0aq\x03K\x01\x85q\x04u]q\x05(K\x01K\x02es.";
        assert!(unpickle(whole).is_ok());
        for end in 0..whole.len() {
            assert!(unpickle(&whole[..end]).is_err(), "cut at {end}");
        }
        for at in 0..whole.len() {
            for value in 0..=255 {
                let mut bytes = whole.to_vec();
                bytes[at] = value;
                // Must return; what it returns depends on the damage.
                let _ = unpickle(&bytes);
            }
        }
    }
}
